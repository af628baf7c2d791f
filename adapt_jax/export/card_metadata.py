"""The metadata of a model card in the hub's own schema: origin, license, data and measured results."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adapt_jax.config.values import OWN, TEXT, named_texts
from adapt_jax.data.documents import hub_name
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.reports.origin import origin_of
from adapt_jax.reports.report import RunReport

_QUANTISED = re.compile(r'Q\d.*\.gguf')
_TASK = 'text-generation'


def metadata(report: RunReport, config: ModelConfig, files: Sequence[str], repo: str = '') -> ModelCardData:
  """The metadata; arguments as of `model_card`. Results are those of the weights that were measured.

  Files that are all quantised have no results, since only the weights before that were measured.
  """
  origin, params = origin_of(report), count_params(config)
  source, pruned = origin.public_name, 'stages' in report or origin.params > params
  ours = [name for name in files if name.endswith(('.safetensors', '.gguf'))]
  quantised = bool(ours) and all(map(is_quantised, ours))
  tags = ['adapt-jax']
  tags += ['pruned'] if pruned else []
  tags += ['custom_code'] if any(name.startswith('modeling_') for name in files) else []
  tags += ['gguf'] if any(name.endswith('.gguf') for name in files) else []
  license: dict[str, Any] = {**origin.license}
  results = [] if quantised else [*_perplexities(report), *_scores(report)]
  relation = 'finetune' if pruned else 'quantized' if quantised else None
  return ModelCardData(
    base_model=source if '/' in source else None,
    base_model_relation=relation if '/' in source else None,
    **license,
    library_name='transformers' if any(name.endswith('.safetensors') for name in files) else None,
    pipeline_tag=_TASK,
    tags=tags,
    datasets=_datasets(report) or None,
    model_name=_line((repo or f'{source}-pruned').rpartition('/')[2]) if results else None,
    eval_results=results or None,
  )


def is_quantised(file: str) -> bool:
  """Whether a file of an export has weights of fewer bits than those that were measured."""
  return bool(_QUANTISED.search(file))


def _datasets(report: RunReport) -> list[str]:
  """The hub data sets that the model was calibrated and trained on."""
  data = report.get('data') or {}
  entries = [entry for use in ('calibration', 'train') for entry in data.get(use) or ()]
  return list(dict.fromkeys(name for entry in entries if (name := _hub_set(entry, report))))


def _hub_set(entry: str, report: RunReport) -> str:
  """The data set's name; '' for an entry that is not one."""
  known = (report.get('data') or {}).get('hub') or ()
  return name if (name := hub_name(entry)) in known else ''


def _perplexities(report: RunReport) -> Iterator[EvalResult]:
  """Of the final model on each text but the dense model's own, which only compares these two."""
  sources = named_texts(tuple((report.get('data') or {}).get('evaluate') or ()))
  for name, found in (report.get('texts') or {}).items():
    value = found.get('recovered', found.get('pruned'))
    if value is not None and name != OWN:
      yield EvalResult(
        **_text(name, sources.get(name, ()), report), metric_type='perplexity', metric_value=value
      )


def _text(name: str, entries: tuple[str, ...], report: RunReport) -> dict[str, Any]:
  """A text as a data set: by its name, configuration and split on the hub, or by the names of its files."""
  names = _line(', '.join(entry.rstrip('/').rpartition('/')[2] for entry in entries) or name)
  # The hub puts results of one type under one name: two directories called valid are not one data set.
  label = names if name == TEXT else name
  fields: dict[str, Any] = {'task_type': _TASK, 'dataset_type': label, 'dataset_name': label}
  if len(entries) == 1 and (hub := _hub_set(entries[0], report)):
    *config, split = entries[0].split(':')[1:] or ['train']
    fields |= {'dataset_type': hub, 'dataset_split': split, 'dataset_config': config[0] if config else None}
  return fields


def _scores(report: RunReport) -> Iterator[EvalResult]:
  """Of the final model on tasks of lm-evaluation-harness."""
  tasks = report.get('tasks') or {}
  for task, metrics in (tasks.get('recovered') or tasks.get('pruned') or {}).items():
    for metric, value in metrics.items():
      if metric not in ('version', 'n') and isinstance(value, (int, float)):
        names: dict[str, Any] = dict.fromkeys(('dataset_type', 'dataset_name'), _line(task))
        yield EvalResult(task_type=_TASK, **names, metric_type=_line(metric), metric_value=value)


def _line(name: str) -> str:
  """A name in one line, so that no line of it can look like the end of the metadata."""
  return ' '.join(name.split())
