"""The README.md of an export: the model, its origin, its loss of quality, and how to load it."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jinja2

from adapt_jax.config.prune_options import PROGRESSIVE
from adapt_jax.export.card_metadata import is_quantised, metadata
from adapt_jax.export.hf import has_stock_type, needs_mlx_code
from adapt_jax.export.padded import padded_config
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.reports.origin import origin_of
from adapt_jax.reports.report import RunReport, heads_of, known_perplexities, names_of
from adapt_jax.reports.summary import gain_table, texts_table
from adapt_jax.reports.table import Table

# Settings that only progressive methods read.
_SCHEDULE = 'steps', 'amplitude', 'importance', 'layer_distance'
_USES = {'calibration': 'Calibration', 'train': 'Training', 'evaluate': 'Evaluation'}
_MARKUP = re.compile(r'[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])')


def _text(value: Any) -> str:
  """The value in one line in which Markdown and HTML mean nothing."""
  return _MARKUP.sub(r'\\\g<0>', ' '.join(str(value).split()))


def _fenced(value: Any) -> str:
  """The value in one line that cannot end a code block."""
  return ' '.join(str(value).split()).replace('`', "'")


def _table(table: Table) -> str:
  return table.markdown(_text) if table.rows else ''


_ENVIRONMENT = jinja2.Environment(
  loader=jinja2.PackageLoader('adapt_jax.export', ''), trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters |= {
  'text': _text,
  'fenced': _fenced,
  'table': _table,
  'code': lambda x: f'`{_fenced(x)}`',
}


def model_card(report: RunReport, config: ModelConfig, files: Sequence[str], repo: str = '') -> str:
  """Markdown with YAML front matter, as the Hugging Face hub reads it.

  Args:
    report: as in report.json, with `model.source` at least; absent or None fields are left out of the card.
    config: of the exported model.
    files: names in the export's directory, which determine how it is loaded.
    repo: repository of the hub that the export is uploaded to, if it is.
  """
  texts, (title, about) = report.get('texts', {}), _about(report, config)
  measured, tasks, names = known_perplexities(report), _tasks(report), names_of(report)
  perplexity = Table(['model', 'perplexity'], [[names[of], f'{x:.2f}'] for of, x in measured.items()])
  data: dict[str, Any] = {**(report.get('data') or {})}
  card = _ENVIRONMENT.get_template('card.jinja').render(
    metadata=metadata(report, config, files, repo).to_yaml(),
    name=origin_of(report).public_name,
    title=title,
    about=about,
    dense=origin_of({'model': report['model']}).public_name,
    teacher=origin_of({'model': report['teacher']}).public_name if 'teacher' in report else '',
    settings=list(_settings(report)),
    data=[(title, data[use]) for use, title in _USES.items() if data.get(use)],
    tokens=_tokens(report),
    stages=_stages(report),
    widths=_widths(report, config),
    gain=gain_table(report),
    speeds=report.get('gain', {}).get('measured'),
    perplexity=texts_table(texts, names) if measured and texts else perplexity,
    definition=(report.get('perplexity') or {}).get('definition'),
    several=len(texts) > 1,
    tasks=tasks,
    health=_health(report),
    quantised=(measured or tasks.rows) and any(map(is_quantised, files)),
    **_loading(config, files, repo),
    command=report.get('command'),
    versions=', '.join(f'{name} {version}' for name, version in report.get('versions', {}).items()),
  )
  return re.sub(r'\n{3,}', '\n\n', card).strip() + '\n'


def _about(report: RunReport, config: ModelConfig) -> tuple[str, list[str]]:
  """What follows the name in the title, and sentences about what was removed."""
  origin, params = origin_of(report), count_params(config)
  if (before := origin.params or params) == params:
    return '', [f'{params:,} parameters, {"retrained" if _tokens(report) else "written"} by adapt-jax.']
  whole = {'vocab_size': origin.vocab_size, 'hidden_size': origin.hidden_size}
  sizes: dict[str, Any] = {k: v for k, v in whole.items() if v and v != getattr(config, k)}
  pruned = count_params(dataclasses.replace(config, **sizes)) != before and not config.sliced_from
  kinds = [(pruned, 'pruned'), (config.sliced_from, 'sliced'), ('hidden_size' in sizes, 'narrowed')]
  kind = next((word for holds, word in kinds if holds), 'trimmed')
  retrained = ' and retrained' if _tokens(report) else ''
  about = [f'{params:,} of {before:,} parameters. {kind.capitalize()}{retrained} by adapt-jax.']
  if pruned:
    about.append('Attention heads, MLP channels or whole layers were removed; layers may differ in width.')
  if 'hidden_size' in sizes or config.sliced_from:
    wide, how = config.sliced_from or sizes['hidden_size'], ' (SliceGPT)' if config.sliced_from else ''
    about.append(
      f'The hidden size was reduced from {wide} to {config.hidden_size}, by principal components of the '
      f'residual stream{how}.'
    )
  if 'vocab_size' in sizes:
    about.append(
      f'The vocabulary was trimmed to {config.vocab_size:,} of {sizes["vocab_size"]:,} tokens, which a '
      f'text uses; the tokenizer here is part of the model, and other words have more tokens.'
    )
  return f', {kind} to {params / before:.1%}', about


def _tokens(report: RunReport) -> int:
  return sum(stage.get('tokens') or 0 for stage in report.get('stages', []))


def _settings(report: RunReport) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
  """The settings of pruning and training that have one value."""
  for what, given in (('Pruning', report.get('prune') or {}), ('Training', report.get('train') or {})):
    ignored = _SCHEDULE if what == 'Pruning' and given.get('method') not in PROGRESSIVE else ()
    one = [(k, v) for k, v in given.items() if isinstance(v, (str, int, float)) and v != '']
    if values := [(k, v) for k, v in one if k not in ignored]:
      yield what, values


def _stages(report: RunReport) -> Table:
  rows = []
  for stage in report.get('stages', []):
    values = [stage.get('perplexity_pruned'), stage.get('perplexity_recovered')]
    measured = [None if value is None else f'{value:.2f}' for value in values]
    rows.append([stage['stage'], f'{stage["params"]:,}', *measured, f'{stage.get("tokens") or 0:,}'])
  _, before, after = names_of(report).values()
  return Table(['stage', 'parameters', f'perplexity {before}', after, 'tokens'], rows)


def _widths(report: RunReport, config: ModelConfig) -> Table:
  """Remaining and original widths by layer; only the remaining ones, if the report has no stages."""
  field, title = heads_of(report)
  rows: Iterable[list[Any]] = []
  if (stages := report.get('stages')) and report.get('prune', {}) is not None and not config.sliced_from:
    last, dense = ((row[field], row['ffn']) for row in (stages[-1], report['model']))  # type: ignore[literal-required]
    pairs = (zip(now, before, strict=True) for now, before in zip(last, dense, strict=True))
    rows = [[i, f'{k} of {dense_k}', f'{f} of {dense_f}'] for i, ((k, dense_k), (f, dense_f)) in
            enumerate(zip(*pairs, strict=True))]  # fmt: skip
  elif not config.uniform and not config.sliced_from:
    rows = [[i, getattr(s, field), s.ffn] for i, s in enumerate(config.layers)]
  return Table(['layer', title, 'MLP channels'], list(rows))


def _tasks(report: RunReport) -> Table:
  tasks, names = report.get('tasks') or {}, names_of(report)
  models = [of for of in names if tasks.get(of)]
  named = dict.fromkeys((t, m) for name in models for t, metrics in tasks[name].items() for m in metrics)
  rows = []
  for task, metric in named:
    if metric not in ('version', 'n'):
      values = [tasks[name].get(task, {}).get(metric) for name in models]
      rows.append([task, metric, *(f'{x:.4f}' if isinstance(x, float) else x for x in values)])
  return Table(['task', 'metric', *(names[of] for of in models)], rows)


def _health(report: RunReport) -> Table:
  """How the dense model and this one answer, if it was measured."""
  health: dict[str, Any] = {**report.get('health', {})}
  of = {model: health[model] for model in ('dense', 'result') if model in health}
  rows = [[model, x.get('usable'), f'{100 * x["repetition"]:.0f} %'] for model, x in of.items()]
  return Table(['model', f'usable of {health.get("answers")}', 'repeating'], rows)


def _loading(config: ModelConfig, files: Sequence[str], repo: str) -> dict[str, Any]:
  """Which programs load the files, and how, for the template."""
  hf = any(name.endswith('.safetensors') for name in files)
  remote = any(name.startswith('modeling_') for name in files)
  windows = any(shape.window for shape in config.layers)  # MLX-LM's Llama and Mistral ignore them
  plain = hf and not remote
  stock = plain and not needs_mlx_code(padded_config(config)) and config.traits.mlx is not None
  own = any(name.startswith('mlx_') for name in files)
  return {
    'where': repo or 'DIRECTORY',
    'repo': repo,
    'hf': hf,
    'remote': remote,
    'asks': remote and not has_stock_type(config),
    'mlx': (own or stock) and not windows,
    'mlx_flag': ' --trust-remote-code' if own else '',
    'gguf': [name for name in files if name.endswith('.gguf')],
  }
