"""Draws a finished run as one picture, for a README: perplexity by stage, and the widths of the layers.

    python scripts/plot_report.py WORKDIR out.svg

Left: pruned and recovered perplexity by stage, with a line for the dense model. Right: MLP channels and KV
heads (or query heads) of every layer after the last stage, against the dense model. It reads
WORKDIR/report.json.
"""

import pathlib
import sys

# Makes a checkout work without installation.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from adapt_jax.models.files import write_text  # noqa: E402
from adapt_jax.reports import charts  # noqa: E402
from adapt_jax.reports.report import RunReport, heads_of, read_report  # noqa: E402
from adapt_jax.reports.run_charts import perplexity_chart, width_charts  # noqa: E402

_GAP = 16
_HEIGHTS = 360, 180  # of the left chart, and of each on the right


def draw(report: RunReport) -> str:
  """The picture as SVG, on white. Raises ValueError if the report lacks data that it shows."""
  if not (stages := report.get('stages')):
    raise ValueError('the report is not of a run that pruned: give the workdir of mode accel or prune')
  model, last = report['model'], stages[-1]
  if 'ffn' not in model:
    raise ValueError('the report does not have the widths of the dense model: run again to write it anew')
  left = perplexity_chart(report, _HEIGHTS[0])
  field, title = heads_of(report)
  before, after = ((shape[field], shape['ffn']) for shape in (model, last))  # type: ignore[literal-required]
  right = width_charts(before, after, ('dense', f'after stage {last["stage"]}'), title, _HEIGHTS[1])
  start = (2 if left else 1) * _GAP + (charts.WIDTH if left else 0)
  width, height = start + charts.WIDTH + _GAP, _HEIGHTS[0] + 2 * _GAP
  parts = [_place(left, _GAP, _GAP, _HEIGHTS[0])] if left else []
  parts += [_place(chart, start, _GAP + i * _HEIGHTS[1], _HEIGHTS[1]) for i, chart in enumerate(right)]
  size = f'width="{width}" height="{height}"'
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size}>'
  return '\n'.join(
    [head, f'<style>{charts.LIGHT}</style>', f'<rect {size} fill="#ffffff"/>', *parts, '</svg>\n']
  )


def _place(chart: str, x: int, y: int, height: int) -> str:
  return chart.replace('<svg ', f'<svg x="{x}" y="{y}" width="{charts.WIDTH}" height="{height}" ', 1)


def main(argv: list[str]) -> int:
  """Returns the exit code."""
  if len(argv) != 3:
    print('usage: python scripts/plot_report.py WORKDIR out.svg', file=sys.stderr)
    return 2
  try:
    report = read_report(pathlib.Path(argv[1]) / 'report.json')
    write_text(argv[2], draw(report))
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
