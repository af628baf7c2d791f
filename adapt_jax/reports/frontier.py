"""What mode frontier found: its report, which files are worth taking, the advice in words, and tables."""

import math
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from adapt_jax.config.values import TEXT
from adapt_jax.reports.report import MadeReport, ModelReport
from adapt_jax.reports.table import Table

SAME_LOSS = 0.001  # nats per token; a smaller difference is none
SAME_SPEED = 1.05  # ratio of speeds up to which they are equal, as in mode bench
SIZE, SPEED = 'MB', 'speed'


class TextFigures(TypedDict):
  """On one text; loss_increase and kl in nats per token, over and from the dense model in 16 bits."""

  perplexity: float
  loss_increase: float
  kl: float


class Spread(TypedDict):
  """Tokens per second over the repeats."""

  median: float
  min: float
  max: float


class FrontierRow(TypedDict):
  """A model in one type. loss_increase, kl: means over the texts. best_for: frontiers that it is on.

  file: in the workdir.
  """

  model: str
  type: str
  source: str
  params: int
  file: str
  bytes: int
  texts: dict[str, TextFigures]
  loss_increase: float
  kl: float
  prefill: NotRequired[Spread]
  decode: NotRequired[Spread]
  best_for: list[str]


class FrontierReport(MadeReport):
  """Report of mode frontier.

  reference: the file that others are compared with. definitions: of perplexity, by text. request: what is
  timed.
  """

  model: ModelReport
  reference: str
  rows: list[FrontierRow]
  advice: list[str]
  definitions: dict[str, str]
  threads: int
  request: str
  repeats: int


def frontier(points: Sequence[tuple[float, float]], same_cost: float = 1.0) -> list[int]:
  """The places of the points that no cheaper point equals, from the cheapest one on.

  Args:
    points: cost (above 0) and loss; lower is better. A point counts as better than a cheaper one only if its
      loss is lower by more than `SAME_LOSS`. Of equal points the first one is taken.
    same_cost: the ratio up to which costs count as equal.
  """
  kept: list[tuple[float, int]] = []  # the lowest cost of those that count as equal, and the best of them
  for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
    cost, loss = points[i]
    if kept and loss >= points[kept[-1][1]][1] - SAME_LOSS:
      continue
    if kept and cost <= kept[-1][0] * same_cost:
      cost, _ = kept.pop()
    kept.append((cost, i))
  return [i for _, i in kept]


def mark(rows: Sequence[FrontierRow]) -> list[str]:
  """Sets `best_for` of all rows, and returns the advice, one sentence for each limit."""
  places = {SIZE: frontier([(row['bytes'], row['loss_increase']) for row in rows])}
  if all('decode' in row for row in rows):
    seconds = [(1 / row['decode']['median'], row['loss_increase']) for row in rows]
    places[SPEED] = frontier(seconds, SAME_SPEED)[::-1]
  for i, row in enumerate(rows):
    row['best_for'] = [limit for limit, of in places.items() if i in of]

  def choices(limit: str, word: str, unit: str, values: Sequence[float]) -> str:
    return '; '.join(f'{word} {_short(values[i], limit)} {unit}: {_name(rows[i])}' for i in places[limit])

  sizes = choices(SIZE, 'from', 'MB', [row['bytes'] / 1e6 for row in rows])
  advice = [f'What to take for a limit of size: {sizes}.']
  if SPEED in places:
    speeds = choices(SPEED, 'up to', 'tokens/s', [row['decode']['median'] for row in rows])
    advice.append(f'What to take for a speed of decoding: {speeds}.')
  return advice


def _name(row: FrontierRow) -> str:
  return f'{row["model"]} in {row["type"]}'


def _short(value: float, limit: str) -> str:
  """Three digits; sizes are rounded up and speeds down, so that the advice keeps its word."""
  unit = 10.0 ** min(0, math.floor(math.log10(value)) - 2)
  whole = (math.ceil if limit == SIZE else math.floor)(value / unit)
  return f'{whole * unit:,.4g}' if unit < 1 else f'{whole:,}'


def table(report: FrontierReport, ranges: bool = True) -> Table:
  """For people: rounded figures, a column of perplexities for each text; speeds with or without ranges."""
  texts = list(report['definitions'])
  rows = []
  for row in report['rows']:
    perplexities = [f'{row["texts"][name]["perplexity"]:.2f}' for name in texts]
    losses = [f'{row["loss_increase"]:.3f}', f'{row["kl"]:.3f}']
    speeds = [_rate(row.get('prefill'), ranges), _rate(row.get('decode'), ranges)]
    cells = [row['model'], row['type'], f'{row["bytes"] / 1e6:,.1f}', *perplexities, *losses, *speeds]
    rows.append([*cells, ', '.join(row['best_for'])])
  names = ['perplexity' if len(texts) == 1 else f'perplexity {name}' for name in texts]
  return Table(['model', 'type', 'MB', *names, 'loss +', 'KL', 'prefill', 'decode', 'best for'], rows)


def _rate(spread: Spread | None, ranges: bool) -> str:
  if spread is None:
    return '–'
  return ('{median:,.1f} ({min:,.1f}–{max:,.1f})' if ranges else '{median:,.1f}').format(**spread)


def values(report: FrontierReport) -> Table:
  """For programs: all figures in full, a row for each model and type."""
  head = ['model', 'type', 'source', 'params', 'bytes', 'loss_increase', 'kl']
  of_texts = [(of, text) for text in report['definitions'] for of in ('perplexity', 'loss_increase', 'kl')]
  of_speeds = [(kind, of) for kind in ('prefill', 'decode') for of in ('median', 'min', 'max')]
  rows = []
  for one in report['rows']:
    row: dict[str, Any] = {**one}
    figures = [row['texts'][text][of] for of, text in of_texts]
    speeds = [row[kind][of] if kind in row else None for kind, of in of_speeds]
    best = [limit in row['best_for'] for limit in (SIZE, SPEED)]
    rows.append([*(row[name] for name in head), *figures, *speeds, *best, row['file']])
  names = [f'{of}_{text}' for of, text in of_texts]
  names += [f'{kind}_tokens_per_second_{of}' for kind, of in of_speeds]
  return Table([*head, *names, 'best_for_size', 'best_for_speed', 'file'], rows)


def notes(report: FrontierReport) -> list[str]:
  """What the figures are, in sentences."""
  texts, threads = report['definitions'], report['threads']
  defined = {how: ', '.join(name for name in texts if texts[name] == how) for how in texts.values()}
  mean = f' Both are means over the {len(texts)} texts.' if len(texts) > 1 else ''
  return [
    f'Loss + is the increase of the loss over {report["reference"]}, in nats per token. KL is the divergence '
    f'from it.{mean}',
    f'A file is best for a limit if no smaller or faster file is as good. Losses within {SAME_LOSS} count as '
    f'equal, and so do speeds within {SAME_SPEED - 1:.0%}.'.replace('%', ' %'),
    f'Speeds are tokens per second on this machine, with {threads} thread{"s" * (threads > 1)}: '
    f'{report["request"]}. They are medians of {report["repeats"]} runs, in which all files alternate.',
    *(f'Perplexity{f" on {name}" if name != TEXT else ""} is {how}.' for how, name in defined.items()),
  ]


def text(report: FrontierReport, ranges: bool = True) -> str:
  """The table, the advice and the notes as Markdown."""
  return '\n\n'.join([table(report, ranges).markdown(), *report['advice'], *notes(report)])
