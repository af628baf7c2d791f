"""Writes the tables of results into the pages, from what the studies have stored in docs/results/.

    python -m scripts.tables

In a page, a table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a function in `TABLES`.
Its arguments are the studies that it reads, by their folders. The line below a table names these data and the
version of adapt-jax that measured them.
"""

import csv
import inspect
import math
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from adapt_jax.models.files import write_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
_MARKED = re.compile(r'(<!-- table: (\w+) -->\n).*?(?=<!-- end -->)', re.DOTALL)
DOMAINS = {'wiki': 'Wikipedia', 'web': 'web', 'chat': 'chat'}
COVERED = {
  **DOMAINS,
  **{name: name for name in ('fiction', 'code', 'instructions')},
  'speeches': 'speeches, unseen',
  'package': 'other code, unseen',
}
_SIX = ['speeches', 'wikipedia', 'code', 'fiction', 'web', 'instructions']
_OF_FAMILIES = {
  'Wikipedia': 'encyclopedia',
  'speeches': 'addresses',
  'own text': 'own',
  'code, unseen': 'code',
}
_OF_METHODS = {'Wikipedia': 'encyclopedia', 'speeches': 'addresses', 'code': 'code'}
_OF_OWN = {**DOMAINS, 'speeches': 'speeches', 'code': 'code'}
_TRAINED = ('healed', 'trained')  # rows of a run with all domains, as in `covered`
_SIX_NAMES = ['speeches', 'Wikipedia', *_SIX[2:]]

Row = dict[str, str]
Rows = Iterator[list[Any]]


class Study:
  """A stored table. name: its folder in docs/results/."""

  def __init__(self, name: str):
    (self.path,) = (ROOT / 'docs/results' / name).glob('*.csv')
    self.rows = list(csv.DictReader(self.path.read_text(encoding='utf-8').splitlines()))

  def row(self, **values: Any) -> Row:
    """The only row with these values, by the last words of columns. Raises ValueError if there is none."""
    wanted = {(name, str(value)) for name, value in values.items()}
    last = [{(name.split('.')[-1], value) for name, value in row.items()} for row in self.rows]
    (found,) = (row for row, words in zip(self.rows, last, strict=True) if wanted <= words)
    return found

  def stamp(self) -> str:
    """The version that measured the rows. Raises ValueError if there is none, or several."""
    (version,) = {row.get('version', '') for row in self.rows}
    if not version:
      raise ValueError(f'{self.path} names no version')
    return version


def _line(row: list[Any]) -> str:
  return '|' + ''.join(f' {cell} |' if cell != '' else ' |' for cell in row)


def _percent(fraction: float) -> str:
  return f'{fraction:.0%}'.replace('%', ' %')


def _show(values: list[float], form: str = '.3f') -> list[str]:
  return [format(value, form) for value in values]


def methods(methods_table: Study) -> Rows:
  yield ['method', 'correction', *(f'{name}, {size}' for size in ('80 %', '60 %') for name in _OF_METHODS)]
  for row in methods_table.rows:
    if row['prune.target'] != '0.8':
      continue
    method, how = row['prune.method'], row['prune.compensate']
    sizes = (row, methods_table.row(method=method, compensate=how, target=0.6))
    found = [float(size[f'excess {of}']) for size in sizes for of in _OF_METHODS.values()]
    yield [
      f'`{method}`',
      {'least_squares': 'LS', 'none': '', 'bias': 'its biases'}[how],
      *_show(found, '.2f'),
    ]


def draws(methods_draws: Study) -> Rows:
  yield ['method', 'kept', 'draws', *_OF_METHODS]
  sizes = dict.fromkeys((row['prune.target'], row['prune.method']) for row in methods_draws.rows)
  for size in sizes:
    rows = [row for row in methods_draws.rows if (row['prune.target'], row['prune.method']) == size]
    found = [sorted(float(row[f'excess {of}']) for row in rows) for of in _OF_METHODS.values()]
    cells = (f'{statistics.median(deltas):.2f} ({deltas[0]:.2f} to {deltas[-1]:.2f})' for deltas in found)
    yield [f'`{size[1]}`', _percent(float(size[0])), len(rows), *cells]


def own(own: Study) -> Rows:
  yield ['calibrated on', 'own text', *_OF_OWN.values()]
  for row in own.rows:
    of = pathlib.PurePath(row['prune.calibration.source']).stem
    found = [(name, f'{float(row[f"excess {name}"]):.2f}') for name in _OF_OWN]
    generated = _percent(float(row['prune.calibration.own']))
    yield [_OF_OWN[of], generated, *(f'**{delta}**' if name == of else delta for name, delta in found)]


def ratios(original: Study) -> Rows:
  yield ['parameters', 'Wikipedia (calibrated)', 'web', 'chat', 'own: Wikipedia', 'web', 'chat']
  dense = original.row(model='dense', size='')

  def lost(model: str, size: str) -> list[float]:
    row = original.row(model=model, size=size)
    return [math.log(float(row[of]) / float(dense[of])) for of in (f'perplexity {x}' for x in DOMAINS)]

  for size in ('110.6 M', '101.3 M', '79.8 M'):
    theirs = lost('original', size)
    for_both = [lost(model, size) for model in ('obs, least squares', 'obs, least squares, own')]
    yield [size, *_show([a / b for ours in for_both for a, b in zip(ours, theirs, strict=True)], '.2f')]


def healed(healing: Study) -> Rows:
  yield ['', *_SIX_NAMES, 'answers']
  for row in healing.rows:
    title = f'`heal={row["passes"]}`' + (', the default' if row['passes'] == '1' else '')
    yield [title, *_show([float(row[name]) for name in _SIX]), row['usable']]


def loss(loss: Study) -> Rows:
  def mean(*names: str) -> str:
    values = [row[name] for name in names]
    return f'{statistics.fmean(map(float, values)):.2f}' if all(values) else ''  # KL is not measured for all

  unseen = {'speeches': 'speeches, unseen', 'package': 'other code, unseen', 'own': 'own text'}
  names = ['share of KL', 'learning rate', 'tokens', 'six domains', *unseen.values()]
  yield ['model', *names, 'KL', 'answers', 'LAMBADA']
  for row in loss.rows:
    deltas = [mean(*(f'excess {of}' for of in list(COVERED)[:6])), *(mean(f'excess {of}') for of in unseen)]
    lambada = f'{100 * float(row["lambada"]):.1f}' if row['lambada'] else ''
    how = [row['train.distill.alpha'] and _percent(float(row['train.distill.alpha'])), row['train.lr']]
    last = [mean(*(f'kl {of}' for of in COVERED)), row['usable'], lambada]
    yield [row['model'], *how, f'{int(row["tokens"]):,}', *deltas, *last]


def covered(covering: Study, trained: Study, longest: Study, weights: Study) -> Rows:
  yield ['', 'training tokens', *COVERED.values(), 'mean']
  rows = [covering.row(tokens=count, lr=-1.0) for count in (204800, 819200)]
  pruned = [
    math.log(float(rows[0][f'perplexity_pruned {of}']) / float(rows[0][f'perplexity_dense {of}']))
    for of in COVERED
  ]

  def lost(row: Row) -> list[float]:
    return [float(row[f'excess {of}']) for of in COVERED]

  few, many = map(lost, rows)
  again, longer = ([lost(of.row(model=model)) for model in _TRAINED] for of in (trained, longest))
  titles = [
    'none',
    '204,800',
    '819,200',
    'none, another seed',
    '819,200, another seed',
    '1,638,400, another seed',
  ]
  for title, found in zip(titles, (pruned, few, many, *again, longer[1]), strict=True):
    yield ['' if title != 'none' else 'Δ', title, *_show([*found, sum(found) / len(found)], '.2f')]
  pairs = [(pruned, few), (pruned, many), again, longer]
  for shares in ('1,1,1,1,1,1,1', '1,2,4,1,1,4,1'):
    pairs.append([lost(weights.row(weights=shares, model=model)) for model in _TRAINED])
  titles = ['204,800', '819,200', *titles[-2:], '204,800, repeated', '204,800, weighted']
  for title, (before, after) in zip(titles, pairs, strict=True):
    closed = [1 - b / a for a, b in zip([*before, sum(before)], [*after, sum(after)], strict=True)]
    yield ['gap closed' if after is few else '', title, *map(_percent, closed)]


def tasks(tasks: Study, trained: Study, longest: Study, trained_coder: Study) -> Rows:
  yield ['model', 'kept', 'training tokens', 'questions', 'PIQA', 'OpenBookQA', 'LAMBADA', 'mean']
  words = {'model': '', 'kept': '80 %', 'questions': '1000'}
  again = [
    {**trained.row(model=model), **words, 'tokens': tokens}
    for model, tokens in zip(_TRAINED, ('healed, seven domains', '819200'), strict=True)
  ]
  again.append({**longest.row(model='trained'), **words})
  names = {'model': 'Qwen2.5-Coder-0.5B', 'kept': 'dense', 'tokens': ''}
  for model, of in (('dense', names), ('trained', words)):
    again.append({**trained_coder.row(model=model), **of, 'questions': '300'})
  for row in (*tasks.rows, *again):
    scores = [100 * float(row[task]) for task in ('piqa', 'openbookqa', 'lambada')]
    name = row['model'] if row['kept'] == 'dense' else ''
    tokens, questions = (f'{int(x):,}' if x.isdigit() else x for x in (row['tokens'], row['questions']))
    yield [name, row['kept'], tokens, questions, *_show([*scores, sum(scores) / len(scores)], '.1f')]


def latency(latency: Study) -> Rows:
  yield ['target', 'asked, ms', 'by the table, ms', 'measured ratio to dense', 'measured again']
  for row in latency.rows:
    milliseconds = (f'{float(row[name]):,.0f}' for name in ('asked', 'reached'))
    yield [_percent(float(row['target'])), *milliseconds, *_show([float(row['ratio']), float(row['again'])])]


def vocabulary(vocabulary: Study) -> Rows:
  yield ['trimmed to the tokens of', 'kept', 'parameters', 'speech', 'Wikipedia']
  for row in vocabulary.rows:
    bits = _show([float(row[f'bits_per_byte {of}']) for of in ('speech', 'wiki')])
    yield [row['texts'], f'{int(row["kept"]):,}', f'{int(row["params"]) / 1e6:.1f} M', *bits]


def files(frontier: Study) -> Rows:
  names = ['MB', 'speeches', 'Wikipedia', 'code', 'mean loss +', 'prefill', 'decode', 'best for']
  yield ['model', 'type', *names]
  for row in frontier.rows:
    best = [name for name, of in (('MB', 'size'), ('speed', 'speed')) if row[f'best_for_{of}'] == 'True']
    found = [float(row[f'loss_increase{of}']) for of in ('_addresses', '_encyclopedia', '_code', '')]
    speeds = [float(row[f'{kind}_tokens_per_second_median']) for kind in ('prefill', 'decode')]
    megabytes = f'{int(row["bytes"]) / 1e6:.1f}'
    yield [row['model'], row['type'], megabytes, *_show(found), *_show(speeds, '.1f'), ', '.join(best)]


def coder_files(qwen_frontier: Study) -> Rows:
  return files(qwen_frontier)


def sizes(family: Study, frontier: Study) -> Rows:
  names = ['MB', 'tokens/s', *_OF_FAMILIES, 'usable answers']
  yield ['SmolLM2-135M-Instruct', *names]
  bf16 = {row['model']: row for row in frontier.rows if row['type'] == 'BF16'}
  answers, megabytes = _answers(family.rows[0], 'usable_dense'), 2 * int(bf16['dense']['params']) / 1e6
  speed = {model: f'{float(row["decode_tokens_per_second_median"]):.1f}' for model, row in bf16.items()}
  yield ['dense', f'{megabytes:.0f}', speed['dense'], *4 * [''], f'{answers} of 40']
  for target, title in ((0.9, ' of the parameters'), (0.8, ''), (0.7, '')):
    row, name = family.row(target=target), _percent(target)
    yield [name + title, _megabytes(row), speed[name], *_of_family(row)]


def coder(qwen_family: Study, qwen_frontier: Study) -> Rows:
  yield ['Qwen2.5-Coder-0.5B-Instruct', 'parameters', 'MB', *_OF_FAMILIES, 'usable answers']
  params = int(qwen_frontier.row(model='dense', type='BF16')['params'])
  answers = f'{_answers(qwen_family.rows[0], "usable_dense")} of 40'
  yield ['dense', f'{params / 1e6:.1f} M', f'{2 * params / 1e6:,.0f}', *4 * [''], answers]
  for row in qwen_family.rows:
    name = _percent(float(row['prune.target']))
    yield [name, f'{int(row["params"]) / 1e6:.1f} M', _megabytes(row), *_of_family(row)]


def larger(larger: Study) -> Rows:
  yield ['Qwen2.5-Coder-1.5B-Instruct at 80 %', 'training tokens', *_OF_FAMILIES, 'usable answers']
  for row in larger.rows:
    found = _show([float(row[f'excess {of}']) for of in _OF_FAMILIES.values()], '.2f')
    answers = f'{row["usable"]} of 40 (dense {row["usable_dense"]})' if row['usable'] else ''
    yield [row['after'], f'{int(row["tokens"]):,}', *found, answers]


def phases(larger_phases: Study) -> Rows:
  yield ['phase', 'tokens', 'minutes', 'GB, measured', 'GB, planned']
  for row in larger_phases.rows:
    tokens = f'{int(row["tokens"]):,}' if row['tokens'] else ''
    yield [row['phase'], tokens, *(row[name] for name in ('minutes', 'gigabytes', 'planned'))]


def minutes(family: Study, covering: Study, longest: Study, qwen_family: Study) -> Rows:
  def total(*rows: Row) -> str:
    return f'{sum(float(row["seconds"]) for row in rows) / 60:.0f}'

  yield ['model', 'job', 'training tokens', 'minutes']
  yield ['SmolLM2-135M-Instruct', 'three sizes, healed', 'none', total(*family.rows)]
  for tokens, job in ((204800, '80 %, healed and trained'), (819200, '')):
    yield ['', job, f'{tokens:,}', total(covering.row(tokens=tokens, lr=-1.0))]
  yield ['', '', '1,638,400', total(longest.row(model='trained'))]
  yield ['Qwen2.5-Coder-0.5B-Instruct', 'three sizes, healed', 'none', total(*qwen_family.rows)]


def growth(growth: Study) -> Rows:
  yield ['model', 'parameters', 'tokens/s', 'slowest–fastest step', 'peak, GB']
  for row in growth.rows:
    rates = [f'{float(row[name]):,.0f}' for name in ('tokens_per_second', 'slowest', 'fastest')]
    peak = f'{int(row["peak_bytes"]) / 1e9:.1f}'
    yield [row['model'], f'{int(row["params"]) / 1e6:,.0f} M', rates[0], '–'.join(rates[1:]), peak]
  sizes, rate, memory = (
    [math.log(float(row[name])) for row in growth.rows]
    for name in ('params', 'tokens_per_second', 'peak_bytes')
  )
  slopes = (statistics.linear_regression(sizes, costs).slope for costs in ([-x for x in rate], memory))
  time, peak = _show(list(slopes), '.1f')
  yield ['exponent of the cost', '', f'{time} (time per token)', '', peak]


def _megabytes(row: Row) -> str:
  return f'{float(row["bytes"]) / 1e6:,.0f}'


def trained_coder(trained_coder: Study) -> Rows:
  domains = {**COVERED, 'own': 'own text'}
  yield ['Qwen2.5-Coder-0.5B-Instruct at 80 %', 'training tokens', *domains.values(), 'usable answers']
  dense, healed, trained = trained_coder.rows
  before, after = ([float(row[f'excess {of}']) for of in domains] for row in (healed, trained))
  answers = f'{trained["usable"]} of 40 (dense {dense["usable"]})'
  yield ['Δ', 'none', *_show(before, '.2f'), '']
  yield ['', '204,800', *_show(after, '.2f'), answers]
  closed = [1 - b / a for a, b in zip(before, after, strict=True)]
  yield ['gap closed', '204,800', *map(_percent, closed), '']


def _answers(row: Row, name: str = 'usable') -> str:
  return f'{float(row[name]):.0f}'


def _of_family(row: Row) -> list[str]:
  """The loss increases of a size, and its usable answers."""
  found = [float(row[f'excess {of}']) for of in _OF_FAMILIES.values()]
  return [*_show(found, '.2f'), _answers(row)]


TABLES: dict[str, Callable[..., Rows]] = {
  table.__name__: table
  for table in (
    methods,
    draws,
    own,
    ratios,
    healed,
    covered,
    loss,
    tasks,
    latency,
    vocabulary,
    files,
    coder_files,
    sizes,
    coder,
    larger,
    phases,
    minutes,
    growth,
    trained_coder,
  )
}


def filled(page: pathlib.Path) -> str:
  """The text of a page with its tables as the data have them."""

  def table(marked: re.Match[str]) -> str:
    studies = [Study(name) for name in inspect.signature(TABLES[marked[2]]).parameters]
    head, *rows = TABLES[marked[2]](*studies)
    lines = [_line(head), '|' + len(head) * '---|', *map(_line, rows)]
    links = dict[str, list[str]]()
    for study in studies:
      path = pathlib.PurePath(os.path.relpath(study.path, page.parent)).as_posix()
      links.setdefault(study.stamp(), []).append(f'[{study.path.parent.name}]({path})')
    data = '; '.join(', '.join([*of, stamp]) for stamp, of in links.items())
    return '\n'.join([marked[1], *lines, '', f'*Data: {data}.*', '', ''])

  return _MARKED.sub(table, page.read_text(encoding='utf-8'))


if __name__ == '__main__':
  for name in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')):
    write_text(name, filled(name))
