"""Draws the pictures of the pages from what the studies have stored in docs/results/.

python -m scripts.pictures
"""

import math

from adapt_jax.models.files import write_text
from adapt_jax.reports import charts, frontier_page
from adapt_jax.reports.frontier import SIZE
from scripts.tables import COVERED, ROOT, Study


def frontier(name: str) -> str:
  """Loss increase over megabytes of all files of mode frontier."""
  rows = [
    {
      'model': row['model'],
      'type': row['type'],
      'bytes': int(row['bytes']),
      'loss_increase': float(row['loss_increase']),
      'best_for': [SIZE] if row['best_for_size'] == 'True' else [],
    }
    for row in Study(name).rows
  ]
  return frontier_page.by_size({'rows': rows})  # type: ignore[typeddict-item]


def recovery() -> str:
  """Loss increase on each domain by training tokens; the point at 0 is the healed model."""
  rows = [row for row in Study('covering').rows if row['train.lr'] == '-1.0']
  cells = sorted(rows, key=lambda row: int(row['train.tokens']))
  series = []
  for colour, (column, domain) in enumerate(COVERED.items()):
    pruned, dense = (float(cells[0][f'perplexity_{of} {column}']) for of in ('pruned', 'dense'))
    points = [(0.0, math.log(pruned / dense))]
    points += [(float(cell['train.tokens']), float(cell[f'excess {column}'])) for cell in cells]
    series.append(charts.Series(domain, points, colour))
  names, title = ('training tokens', 'loss increase, nats per token'), 'Loss increase by training tokens'
  return charts.line_chart(title, names, series, levels=[(0, 'dense')], height=300)


def pictures() -> dict[str, str]:
  """File name in docs/ to SVG text."""
  drawn = {'frontier.svg': frontier('frontier'), 'recovery.svg': recovery()}
  return drawn | {'frontier-dark.svg': charts.dark(drawn['frontier.svg'])}


if __name__ == '__main__':
  for name, picture in pictures().items():
    write_text(ROOT / 'docs' / name, picture)
