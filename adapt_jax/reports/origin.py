"""Where a model comes from: the model before anything was removed, as `lineage.json` and cards name it."""

import dataclasses
import os
import pathlib
import re
import shlex
from typing import Any

from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.reports.report import RunReport


@dataclasses.dataclass(frozen=True)
class Origin:
  """The model that another was made from; sizes are 0 if they are not known.

  source: a hub id, or the path of a local model, of which `lineage.json` has only the name.
  hub: whether it is an id of the hub. license: fields of a model card that name it.
  params, vocab_size, hidden_size: of this model. attention: the unit of attention that pruning removed.
  """

  source: str
  hub: bool = False
  license: dict[str, str] = dataclasses.field(default_factory=dict)
  params: int = 0
  vocab_size: int = 0
  hidden_size: int = 0
  attention: str = ''

  def sized(self, config: ModelConfig) -> 'Origin':
    """With the sizes of this model, if they are not known."""
    if self.params:
      return self
    sizes: dict[str, Any] = {'vocab_size': config.vocab_size, 'hidden_size': config.hidden_size}
    return dataclasses.replace(self, params=count_params(config), **sizes)

  @property
  def public_name(self) -> str:
    """The hub id, or only the name of a local model: its path is of no use to others."""
    return self.source if self.hub else pathlib.PurePath(self.source).name

  def report(self) -> RunReport:
    """A report that says only where the model comes from."""
    model: Any = {'source': self.source, 'hub': self.hub, 'license': self.license}
    return {'model': model | {'params_before': self.params}, 'origin': dataclasses.asdict(self)}


def origin_of(report: RunReport) -> Origin:
  """The origin in a report, or the model of a report that has none."""
  if found := report.get('origin'):
    return Origin(**found)
  model = report['model']
  given = model['source'], model.get('hub', False), model.get('license') or {}, model.get('params_before', 0)
  return Origin(*given)


_PATH = re.compile(r'[^\s\'",=()\[\]]*/[^\s\'",=()\[\]]*')
_NAMED = re.compile(r'((?:--)?[\w.-]+=|)(.*)', re.DOTALL)  # --config.train.source=…, wiki=…


def without_paths(value: Any, key: str = '') -> Any:
  """JSON with only the names of local files and directories, for `lineage.json`, which others will read."""
  if isinstance(value, dict):
    return {name: without_paths(item, name) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [without_paths(item) for item in value]
  if not isinstance(value, str):
    return value
  if key == 'command':  # its words may hold blanks
    return shlex.join(map(_entries, shlex.split(value)))
  return _entries(value)


def _entries(text: str) -> str:
  """A path, or entries between commas, each perhaps behind a name and an equals sign."""
  if _is_local(text):
    return pathlib.Path(text).name
  flag, rest = _NAMED.match(text).groups()  # type: ignore[union-attr]
  return flag + ','.join(map(_entry, rest.split(',')))


def _entry(text: str) -> str:
  name, path = _NAMED.match(text).groups()  # type: ignore[union-attr]
  return name + (_name(path) if _is_local(path) else _PATH.sub(lambda found: _name(found[0]), path))


def _name(text: str) -> str:
  text = text.removeprefix('file://')
  return pathlib.Path(text).name if _is_local(text) else text


def _is_local(text: str) -> bool:
  return '/' in text and (text.startswith(('/', '~', './', '../')) or os.path.exists(text))
