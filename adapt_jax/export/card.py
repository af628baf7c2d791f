"""The README.md of an export: the model, its origin, its loss of quality, and how to load it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from adapt_jax.config.prune_options import PROGRESSIVE
from adapt_jax.export.card_metadata import is_quantised, metadata
from adapt_jax.export.hf import needs_mlx_code
from adapt_jax.export.padded import padded_config
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.reports.origin import origin_of
from adapt_jax.reports.report import RunReport, heads_of, known_perplexities
from adapt_jax.reports.summary import texts_table

# Settings that only progressive methods read.
_SCHEDULE = 'steps', 'amplitude', 'importance', 'layer_distance'
_MARKUP = re.compile(r'[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])')


def model_card(report: RunReport, config: ModelConfig, files: Sequence[str], repo: str = '') -> str:
  """Markdown with YAML front matter, as the Hugging Face hub reads it.

  Args:
    report: as in report.json, with `model.source` at least; absent or None fields are left out of the card.
      In addition to a run's fields: `prune` and `train`, the settings ({name: value}; groups in them are not
      shown); `data`, {'calibration': [source, …], 'train': …, 'evaluate': …}; and `tasks`,
      {'dense': {task: {metric: value}}, 'pruned': …, 'recovered': …}.
    config: of the exported model.
    files: names in the export's directory, which determine how it is loaded.
    repo: repository of the hub that the export is uploaded to, if it is.
  """
  parts = [
    f'---\n{metadata(report, config, files, repo).to_yaml()}\n---',
    _title(report, config),
    _lineage(report),
    _widths(report, config),
    _perplexity(report),
    _tasks(report.get('tasks') or {}),
    _quantised(report, files),
    _loading(config, files, repo),
    _made(report),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _title(report: RunReport, config: ModelConfig) -> str:
  origin, params = origin_of(report), count_params(config)
  source, before = _text(origin.public_name), origin.params or params
  if before == params:
    return f'# {source}\n\n{params:,} parameters, written by adapt-jax.'
  if config.sliced_from:
    return (
      f'# {source}, sliced to {params / before:.1%}\n\n'
      f'{params:,} of {before:,} parameters: the residual stream was reduced from {config.sliced_from} to '
      f'{config.hidden_size} principal components (SliceGPT, arXiv 2401.15024). Sliced by adapt-jax.'
    )
  tokens = origin.vocab_size if origin.vocab_size != config.vocab_size else 0
  wide = origin.hidden_size if origin.hidden_size != config.hidden_size else 0
  reduced = ([_vocabulary(tokens, config)] if tokens else []) + ([_hidden(wide, config)] if wide else [])
  counts = f'{params:,} of {before:,} parameters'
  sizes: dict[str, Any] = {
    name: size for name, size in (('vocab_size', tokens), ('hidden_size', wide)) if size
  }
  layers_whole = count_params(dataclasses.replace(config, **sizes)) == before
  if layers_whole and not wide:
    return f'# {source}, its vocabulary trimmed\n\n{counts}: {reduced[0]}'
  if layers_whole:
    done = f'Narrowed{" and retrained" if _tokens(report) else ""} by adapt-jax.'
    return '\n\n'.join([f'# {source}, narrowed to {params / before:.1%}', f'{counts}. {done}', *reduced])
  heads = 'query heads' if heads_of(report)[0] == 'num_heads' else 'whole KV-head groups'
  removed = f'{heads} and MLP channels were removed, and layers may differ in width'
  widths = [pair for _, *pairs in _widths_of(report) for pair in pairs]
  if before != report['model'].get('params_before', before):  # the report knows only the last pruning
    removed = 'attention heads, MLP channels or whole layers were removed, and layers may differ in width'
  elif widths and all(now in (0, dense) for now, dense in widths):
    removed = 'whole layers were removed'
  retrained = ' and retrained' if _tokens(report) else ''
  pruned = f'{counts}: {removed}. Pruned{retrained} by adapt-jax.'
  return '\n\n'.join([f'# {source}, pruned to {params / before:.1%}', pruned, *reduced])


def _hidden(wide: int, config: ModelConfig) -> str:
  return (
    f'The hidden size was reduced from {wide} to {config.hidden_size}, by principal components of the '
    f'residual stream.'
  )


def _vocabulary(before: int, config: ModelConfig) -> str:
  return (
    f'The vocabulary was trimmed to {config.vocab_size:,} of {before:,} tokens, those of a text; the '
    f'tokenizer here is part of the model, and other words have more tokens.'
  )


def _tokens(report: RunReport) -> int:
  return sum(stage.get('tokens') or 0 for stage in report.get('stages', []))


def _lineage(report: RunReport) -> str:
  origin, dense = origin_of(report), origin_of({'model': report['model']})
  rows = [f'- Base model: {_code(origin.public_name)}']
  if dense.source != origin.source:
    name = dense.public_name
    rows.append(f'- Pruned from: {_code(name)}, an export of adapt-jax; it is the dense model below')
  for given, title in ((report.get('prune') or {}, 'Pruning'), (report.get('train') or {}, 'Training')):
    ignored = _SCHEDULE if title == 'Pruning' and given.get('method') not in PROGRESSIVE else ()
    fields = [(k, v) for k, v in given.items() if k not in ignored]
    if settings := [
      f'{_text(k)} {_code(v)}' for k, v in fields if isinstance(v, (str, int, float)) and v != ''
    ]:
      rows.append(f'- {title}: ' + ', '.join(settings))
  for name, title in (('calibration', 'Calibration'), ('train', 'Training'), ('evaluate', 'Evaluation')):
    if sources := (report.get('data') or {}).get(name):
      rows.append(f'- {title} data: ' + ', '.join(map(_code, sources)))
  if tokens := _tokens(report):
    rows.append(f'- Recovery training: {tokens:,} tokens')
  table = ''
  if stages := report.get('stages'):
    cells = [[s['stage'], f'{s["params"]:,}', s.get('perplexity_pruned'), s.get('perplexity_recovered'),
              f'{s.get("tokens") or 0:,}'] for s in stages]  # fmt: skip
    table = '\n\n' + _table(['stage', 'parameters', 'perplexity pruned', 'recovered', 'tokens'], cells)
  return '## Lineage\n\n' + '\n'.join(rows) + table


def _widths(report: RunReport, config: ModelConfig) -> str:
  """Remaining and original widths by layer; only the remaining ones, if the report has no stages."""
  if config.sliced_from:
    return ''
  field, title = heads_of(report)
  if report.get('stages'):
    rows = [[i, f'{k} of {dense_k}', f'{f} of {dense_f}']
            for i, (k, dense_k), (f, dense_f) in _widths_of(report)]  # fmt: skip
  elif config.uniform:
    return ''
  else:
    rows = [[i, getattr(s, field), s.ffn] for i, s in enumerate(config.layers)]
  return '## Widths\n\n' + _table(['layer', title, 'MLP channels'], rows)


def _widths_of(report: RunReport) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
  """Of each layer its number and, for heads and MLP channels, how many remain and how many there were."""
  if not (stages := report.get('stages')):
    return []
  field, last, dense = heads_of(report)[0], stages[-1], report['model']
  heads = zip(last[field], dense[field], strict=True)  # type: ignore[literal-required]
  channels = zip(last['ffn'], dense['ffn'], strict=True)
  return [(i, *pairs) for i, pairs in enumerate(zip(heads, channels, strict=True))]


def _perplexity(report: RunReport) -> str:
  found = [[of, value] for of, value in known_perplexities(report).items()]
  if not found:
    return ''
  texts = report.get('texts', {})
  if len(texts) > 1:
    words = next(iter(texts.values())).get('definition')
    parts = [texts_table(texts).markdown(_text), f'On the first text: {_text(words)}.' if words else '']
  else:
    words = report['perplexity'].get('definition')
    parts = [_table(['model', 'perplexity'], found), f'{_paragraph(words)}.' if words else '']
  return '\n\n'.join(['## Perplexity', *filter(None, parts)])


def _tasks(tasks: dict[str, dict[str, dict[str, Any]]]) -> str:
  models = [name for name in ('dense', 'pruned', 'recovered') if tasks.get(name)]
  rows = list(dict.fromkeys((t, m) for name in models for t, metrics in tasks[name].items()
    for m in metrics if m not in ('version', 'n')))  # fmt: skip
  if not rows:
    return ''
  cells = [[t, m, *(tasks[name].get(t, {}).get(m) for name in models)] for t, m in rows]
  return '## Tasks\n\n' + _table(['task', 'metric', *models], cells, '.4f')


def _quantised(report: RunReport, files: Sequence[str]) -> str:
  measured = known_perplexities(report) or report.get('tasks')
  if not measured or not any(map(is_quantised, files)):
    return ''
  return 'These figures are of the weights before they were quantised.'


def _loading(config: ModelConfig, files: Sequence[str], repo: str) -> str:
  blocks, where = [], repo or 'DIRECTORY'
  if any(name.endswith('.safetensors') for name in files):
    remote = any(name.startswith('modeling_') for name in files)
    trust, flag = (', trust_remote_code=True', ' --trust-remote-code') if remote else ('', '')
    mlx = ' --trust-remote-code' if any(name.startswith('mlx_') for name in files) else ''
    blocks += [
      'With transformers 4.57 or newer:',
      '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
      f"tokenizer = AutoTokenizer.from_pretrained('{where}'{trust})\n"
      f"model = AutoModelForCausalLM.from_pretrained('{where}'{trust}, device_map='auto')\n```",
      f'With vLLM: `vllm serve {where}{flag}`',
    ]
    windows = any(shape.window for shape in config.layers)  # MLX-LM's Llama and Mistral ignore them
    stock = not remote and not needs_mlx_code(padded_config(config)) and config.traits.mlx is not None
    if (mlx or stock) and not windows:
      blocks.append(f"With MLX-LM: `mlx_lm.generate --model {where}{mlx} --prompt 'Hello'`")
    if remote:
      blocks.append('The Python files next to the weights define the model class.')
  for name in files:
    if name.endswith('.gguf'):
      kind = name.removeprefix('model-').removesuffix('.gguf')
      given = f'-hf {repo}:{kind}' if repo else f'-m {name}'
      blocks.append(f"With llama.cpp: `llama-cli {given} -p 'Hello'`")
  return '## Load it\n\n' + '\n\n'.join(blocks) if blocks else ''


def _made(report: RunReport) -> str:
  parts = []
  if command := report.get('command'):
    fence = _longest(command, 2) * '`'
    parts.append(f'{fence}sh\n{command}\n{fence}')
  if versions := report.get('versions'):
    parts.append(_paragraph(', '.join(f'{name} {version}' for name, version in versions.items())))
  return '## Made by\n\n' + '\n\n'.join(parts) if parts else ''


def _code(value: Any) -> str:
  """The value in one line as code, whatever it contains."""
  text = ' '.join(str(value).split()) or ' '
  fence, space = _longest(text, 0) * '`', ' ' * (text[:1] == '`' or text[-1:] == '`')
  return f'{fence}{space}{text}{space}{fence}'


def _longest(text: str, least: int) -> int:
  """One more than the longest run of backticks in the text, and than `least`."""
  return 1 + max([least, *map(len, re.findall('`+', text))])


def _text(value: Any) -> str:
  """The value in one line in which Markdown and HTML mean nothing."""
  return _MARKUP.sub(r'\\\g<0>', ' '.join(str(value).split()))


def _paragraph(value: Any) -> str:
  """As `_text`, at the begin of a line, where a few more characters have a meaning."""
  return re.sub(r'^(\d*)([#+=.)-])', r'\1\\\2', _text(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], number: str = '.2f') -> str:
  """A Markdown table; None is an empty cell."""

  def show(value: Any) -> str:
    return '' if value is None else format(value, number) if isinstance(value, float) else _text(value)

  lines = [list(map(_text, head)), ['---'] * len(head), *([show(value) for value in row] for row in rows)]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
