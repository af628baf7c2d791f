"""Draws a finished run as one picture, for a README: perplexity by stage, and the widths of the layers.

    python scripts/plot_report.py WORKDIR out.svg

Left: pruned and recovered perplexity by stage, with a line for the dense model. Right: MLP channels and KV
heads (or query heads) of every layer after the last stage, against the dense model. It reads
WORKDIR/report.json.
"""

import pathlib
import re
import sys

# Makes a checkout work without installation.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from adapt_jax.models.errors import reading  # noqa: E402
from adapt_jax.models.files import write_text  # noqa: E402
from adapt_jax.reports import charts  # noqa: E402
from adapt_jax.reports.report import RunReport, heads_of, read_report  # noqa: E402
from adapt_jax.reports.run_charts import perplexity_chart, width_charts  # noqa: E402

_GAP = 16


def draw(report: RunReport) -> str:
  """The picture as SVG, on white."""
  model, last = report['model'], report['stages'][-1]
  field, title = heads_of(report)
  before, after = ((shape[field], shape['ffn']) for shape in (model, last))  # type: ignore[literal-required]
  right = width_charts(before, after, ('dense', f'after stage {last["stage"]}'), title)
  sizes = [_height(chart) for chart in right]
  left = perplexity_chart(report, sum(sizes) - 15)  # its legend is a line high
  start, height = 2 * _GAP + charts.WIDTH, sum(sizes) + 2 * _GAP
  parts = [_place(left, _GAP, _GAP), _place(right[0], start, _GAP), _place(right[1], start, _GAP + sizes[0])]
  size = f'width="{start + charts.WIDTH + _GAP}" height="{height}"'
  background = f'<rect {size} fill="#ffffff"/>'
  return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', background, *parts, '</svg>\n'])


def _height(chart: str) -> int:
  return int(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', chart)[0])


def _place(chart: str, x: int, y: int) -> str:
  """The chart at this place of the picture."""
  size = f'x="{x}" y="{y}" width="{charts.WIDTH}" height="{_height(chart)}"' if chart else ''
  return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, chart[chart.find('<svg') :], count=1)


def main(argv: list[str]) -> int:
  """Returns the exit code."""
  if len(argv) != 3:
    print('usage: python scripts/plot_report.py WORKDIR out.svg', file=sys.stderr)
    return 2
  path = pathlib.Path(argv[1]) / 'report.json'
  try:
    with reading('the report', path, 'give the workdir of a finished run of mode accel or prune'):
      picture = draw(read_report(path))
    write_text(argv[2], picture)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
