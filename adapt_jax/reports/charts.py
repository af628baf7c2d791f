"""Charts as SVG, drawn by matplotlib: lines, bars over layers, heat maps of layers × steps.

A chart is an SVG file with light colours; `inline` makes it a part of a page, with the reader's light or dark
ones. Values that are not finite are left out, and a chart without any is ''.
"""

import contextlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

WIDTH = 440  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 62, 14, 26, 40, 15
_LEGEND = 70  # letters in a line of the legend

# Name -> colour on light and on dark pages; c0, c1, … are those of series.
PALETTE = {
  'ink': ('#1b2330', '#e6eaf0'),
  'muted': ('#586374', '#9aa7b8'),
  'line': ('#dce1e8', '#333c49'),
  'paper': ('#ffffff', '#1a2029'),
  'c0': ('#1c64d8', '#6ea8fe'),
  'c1': ('#c2410c', '#fb8c4b'),
  'c2': ('#15803d', '#4ecb7d'),
  'c3': ('#7c3aed', '#b794f6'),
  'c4': ('#db2777', '#f77fbe'),
  'c5': ('#0891b2', '#35d0e6'),
  'c6': ('#946b00', '#e9c83f'),
  'c7': ('#3f3f46', '#e4e4e7'),
}
COLOURS = sum(re.fullmatch(r'c\d', name) is not None for name in PALETTE)  # further series reuse them, dashed
_INK, _MUTED, _GRID, _PAPER = (PALETTE[name][0] for name in ('ink', 'muted', 'line', 'paper'))
_STYLE: dict[Any, Any] = {
  'svg.fonttype': 'none', 'svg.hashsalt': 'adapt-jax', 'text.usetex': False, 'text.parse_math': False,
  'font.sans-serif': ['DejaVu Sans'], 'font.size': 10, 'axes.edgecolor': _GRID, 'axes.facecolor': _PAPER,
  'axes.labelcolor': _MUTED, 'axes.labelsize': 10, 'axes.grid': True, 'axes.axisbelow': True,
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.spines.left': False, 'grid.color': _GRID,
  'xtick.color': _MUTED, 'ytick.color': _MUTED, 'xtick.bottom': False, 'ytick.left': False,
  'text.color': _INK, 'lines.linewidth': 1.6, 'lines.markersize': 4, 'legend.frameon': False,
}  # fmt: skip

Labelled = Sequence[tuple[float, str]]
Pair = tuple[str, str]


class Series(NamedTuple):
  """One line through the points (x, y). kind: line (with dots), curve (without), step or dots.

  ranges: x, lowest and highest y of vertical bars, for the range over repetitions.
  """

  name: str
  points: Sequence[tuple[float, float]]
  colour: int = 0
  kind: str = 'line'
  ranges: Sequence[tuple[float, float, float]] = ()
  dashed: bool = False


def css() -> str:
  """The colours of pages as CSS variables, light or dark as the reader prefers."""
  light, dark = (';'.join(f'--{name}:{pair[i]}' for name, pair in PALETTE.items()) for i in (0, 1))
  return f':root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n'


def inline(chart: str) -> str:
  """The chart's `<svg>` for a page with `css`."""
  for name, (light, _) in PALETTE.items():
    chart = chart.replace(light, f'var(--{name})')
  svg = chart[chart.index('<svg') :]
  return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart" role="img"', svg, count=1)


def number(value: float, _: Any = None) -> str:
  """A number of an axis: 0.0002, 4.5, 20k, 1.2M."""
  units = ((1e9, 'B'), (1e6, 'M'), (1e4, 'k'))
  suffix = next((suffix for least, suffix in units if abs(value) >= least), '')
  return f'{value / {"B": 1e9, "M": 1e6, "k": 1e3, "": 1}[suffix]:.6g}{suffix}'


@contextlib.contextmanager
def _figure(
  title: str, names: Pair, height: int, legend: Sequence[str] = ()
) -> Iterator[tuple[Any, Any, Any]]:
  """A file for the chart, its figure and axes, with room above for a legend with these names."""
  import matplotlib.backends.backend_svg  # takes a second
  from matplotlib.figure import Figure

  columns = max(1, _LEGEND // (max(map(len, legend), default=0) + 5))
  top = _TOP + _LINE * -(-len(legend) // columns)
  height += top - _TOP
  out = io.StringIO()
  # Browsers have other fonts: letters that the measuring one lacks are drawn all the same.
  with matplotlib.rc_context(_STYLE), warnings.catch_warnings(action='ignore', category=UserWarning):
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=_PAPER)
    inside = (WIDTH - _LEFT - _RIGHT) / WIDTH, (height - top - _BOTTOM) / height
    axes = figure.add_axes((_LEFT / WIDTH, _BOTTOM / height, *inside))
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    figure.text(4 / WIDTH, 1 - 16 / height, title, fontsize=12, fontweight='bold')
    yield out, figure, axes
    if legend:
      place: Any = {'loc': 'upper left', 'bbox_to_anchor': (_LEFT / WIDTH - 0.02, 1 - 18 / height)}
      figure.legend(ncols=columns, borderpad=0, labelspacing=0.3, handlelength=1.6, **place)
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})


def _svg(out: io.StringIO) -> str:
  """The file's text without the ids that nothing refers to, which a page would have twice."""
  return re.sub(r' id="[a-z0-9.]+_\d+"', '', out.getvalue())


def _apart(places: Iterable[float], least: float) -> list[bool]:
  """Whether each place, a share of the axis, has `least` to those kept before it."""
  kept: list[float] = []
  for place in places:
    kept.append(place if all(abs(place - other) >= least for other in kept) else math.inf)
  return [math.isfinite(place) for place in kept]


def _lines(axes: Any, marks: Labelled, levels: Labelled) -> None:
  """Vertical and horizontal lines with names; a name that would cover another is left out."""
  for value, _ in marks:
    axes.axvline(value, color=_MUTED, linestyle=':', linewidth=1)
  for value, _ in levels:
    axes.axhline(value, color=_INK, linestyle='--', linewidth=0.8)
  place = (axes.transData + axes.transAxes.inverted()).transform
  middle = axes.get_ylim()[0], axes.get_xlim()[0]
  across = [place((value, middle[0]))[0] for value, _ in marks]
  for (value, name), shown in zip(marks, _apart(across, 0.14), strict=True):
    if shown:
      axes.text(value, 1, f' {name}', transform=axes.get_xaxis_transform(), va='top', color=_MUTED, size=9)
  up = [place((middle[1], value))[1] for value, _ in levels]
  for (value, name), shown in zip(levels, _apart(up, 0.07), strict=True):
    if shown:
      axes.text(1, value, name, transform=axes.get_yaxis_transform(), ha='right', va='bottom', size=9)


def _draw(axes: Any, one: Series) -> None:
  colour, many = PALETTE[f'c{one.colour % COLOURS}'][0], len(one.points) > 60
  look: dict[str, Any] = {
    'drawstyle': 'steps-post' if one.kind == 'step' else 'default',
    'linestyle': 'none' if one.kind == 'dots' else '--' if one.dashed else '-',
    'marker': '' if one.kind == 'curve' or many else 'o',
  }
  xs, ys = zip(*one.points, strict=True)
  axes.plot(xs, ys, color=colour, label=one.name or '_', **look)
  for x, low, high in one.ranges:
    axes.vlines(x, low, high, color=colour, alpha=0.5)


def line_chart(
  title: str,
  names: Pair,
  series: Sequence[Series],
  *,
  x_range: Sequence[float] = (),
  marks: Labelled = (),
  levels: Labelled = (),
  log: bool = False,
  integer: bool = False,
  categories: Sequence[str] = (),
  height: int = 250,
  most: float = math.inf,
) -> str:
  """Lines over x with vertical `marks` and horizontal `levels`.

  names: of x and y. x_range: values that the x axis includes. log: whether y is logarithmic. integer: whether
  ticks of x are whole numbers. categories: names of x = 0, 1, …. most: points above are drawn at that y.
  """
  finite = [[(x, min(y, most)) for x, y in s.points if math.isfinite(x) and math.isfinite(y)] for s in series]
  drawn = [s._replace(points=points) for s, points in zip(series, finite, strict=True) if points]
  if not drawn:
    return ''
  named = [s._replace(name=s.name if len(s.name) <= _LEGEND else f'{s.name[: _LEGEND - 1]}…') for s in drawn]
  with _figure(title, names, height, [s.name for s in named if s.name]) as (out, _, axes):
    from matplotlib import ticker

    axes.set_yscale('log' if log else 'linear')
    axes.set_xlim(auto=True)
    for one in named:
      _draw(axes, one)
    if x_range:
      axes.set_xlim(min(x_range[0], axes.get_xlim()[0]), max(*x_range, axes.get_xlim()[1]))
    if log:
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(number)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=integer))
    axes.xaxis.set_major_formatter(number)
    if categories:
      most_letters = max(4, 60 // len(categories))
      axes.set_xticks(range(len(categories)), [name[:most_letters] for name in categories])
    _lines(axes, marks, [level for level in levels if math.isfinite(level[0])])
  return _svg(out)


def bar_chart(
  title: str, unit: str, before: Sequence[int], after: Sequence[int], names: Pair, colour: int, height: int
) -> str:
  """Bars of the layers' widths, `after` drawn over `before`; `names` label both in the legend."""
  with _figure(title, ('layer', unit), height, names) as (out, _, axes):
    from matplotlib import ticker

    for widths, name, shade in zip((before, after), names, ('line', f'c{colour}'), strict=True):
      axes.bar(range(len(widths)), widths, 0.84, color=PALETTE[shade][0], label=name)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(ticker.MaxNLocator(6, integer=True))
      axis.set_major_formatter(number)
  return _svg(out)


def axis_end(values: Iterable[float]) -> float:
  """Where an axis or a scale ends: 4 times the third quartile; a few values far above flatten the others."""
  known = sorted(value for value in values if math.isfinite(value))
  return 4 * known[3 * len(known) // 4] if known and known[0] >= 0 else math.inf


def heat_map(
  title: str, columns: Sequence[Sequence[float]], steps: Sequence[int], most: float = math.inf
) -> str:
  """Layers (rows, 0 on top) × steps (columns) and the scale; values above `most` have its colour."""
  finite = [value for value in itertools.chain(*columns) if math.isfinite(value)]
  if not finite:
    return ''
  low, high = min(finite), min(max(finite), most)
  with _figure(title, ('pruning step', 'layer'), 250) as (out, figure, axes):
    from matplotlib import ticker

    rows = [
      [value if math.isfinite(value) else math.nan for value in row] for row in zip(*columns, strict=True)
    ]
    image = axes.imshow(rows, aspect='auto', interpolation='none', vmin=low, vmax=high)
    axes.grid(False)
    scale = figure.colorbar(image, ax=axes, extend='max' if max(finite) > most else 'neither')
    scale.solids.set_rasterized(True)
    scale.outline.set_visible(False)
    scale.ax.grid(False)
    axes.set_xticks(
      range(0, len(steps), -(-len(steps) // 8)), [str(s) for s in steps[:: -(-len(steps) // 8)]]
    )
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  return _svg(out)
