"""Charts as SVG, drawn by matplotlib: lines, bars over layers, heat maps of layers × steps.

A chart is an SVG file with light colours; `inline` makes it a part of a page, with the reader's light or dark
ones. Values that are not finite are left out, and a chart without any is ''.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

WIDTH = 440  # pixels
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
  'figure.facecolor': _PAPER, 'figure.titlesize': 12, 'figure.titleweight': 'bold',
}  # fmt: skip

Labelled = Sequence[tuple[float, str]]


class Series(NamedTuple):
  """One line through the points (x, y). kind: line (with dots), curve (without), step or dots.

  ranges: x, lowest and highest y of vertical bars, for the range over repetitions. labels: written below the
  points.
  """

  name: str
  points: Sequence[tuple[float, float]]
  colour: int = 0
  kind: str = 'line'
  ranges: Sequence[tuple[float, float, float]] = ()
  dashed: bool = False
  labels: Sequence[str] = ()


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


def dark(chart: str) -> str:
  """The chart in the colours of dark pages."""
  for light, on_dark in PALETTE.values():
    chart = chart.replace(light, on_dark)
  return chart


def number(value: float, _: Any = None) -> str:
  """A number of an axis: 0.0002, 4.5, 20k, 1.2M."""
  units = ((1e9, 'B'), (1e6, 'M'), (1e4, 'k'))
  suffix = next((suffix for least, suffix in units if abs(value) >= least), '')
  return f'{value / {"B": 1e9, "M": 1e6, "k": 1e3, "": 1}[suffix]:.6g}{suffix}'


def _svg(title: str, names: tuple[str, str], height: int, draw: Callable[[Any, Any], None]) -> str:
  """The SVG of what `draw` adds to a figure and its axes; names: of x and y. A legend makes it higher."""
  import matplotlib.backends.backend_svg  # takes a second
  from matplotlib import ticker
  from matplotlib.figure import Figure

  out = io.StringIO()
  # Browsers have other fonts: letters that the measuring one lacks are drawn all the same.
  with matplotlib.rc_context(_STYLE), warnings.catch_warnings(action='ignore', category=UserWarning):
    figure = Figure()
    figure.suptitle(title, x=0.01, horizontalalignment='left')
    axes = figure.add_subplot(xlabel=names[0], ylabel=names[1])
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(ticker.MaxNLocator(6))
      axis.set_major_formatter(number)
    draw(figure, axes)
    below = 42
    if labels := axes.get_legend_handles_labels()[1]:
      columns = max(1, _LEGEND // (max(map(len, labels)) + 5))
      below += 15 * -(-len(labels) // columns)
      figure.legend(ncols=columns, loc='lower left', labelspacing=0.3, handlelength=1.6)
    height += below - 42
    figure.set_size_inches(WIDTH / 72, height / 72)
    figure.subplots_adjust(0.15, below / height, 0.97, 1 - 28 / height)
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})
  return re.sub(r' id="[a-z0-9.]+_\d+"', '', out.getvalue())  # a page would have these ids twice


def _name_lines(axes: Any, lines: Labelled, vertical: bool) -> None:
  """Writes the names of lines beside them, unless one would cover another."""
  places: list[float] = []
  for value, name in lines:
    x, y = (axes.transData + axes.transAxes.inverted()).transform((value, value))
    place, least = (x, 0.14) if vertical else (y, 0.07)
    if all(abs(place - other) >= least for other in places):
      places.append(place)
      where = (x, 1, f' {name}') if vertical else (0.01, y, name)  # most curves fall to the right
      aligned = {'va': 'top', 'color': _MUTED} if vertical else {'va': 'bottom', 'ha': 'left'}
      axes.text(*where, transform=axes.transAxes, size=9, **aligned)


def _draw(axes: Any, one: Series) -> None:
  colour = PALETTE[f'c{one.colour % COLOURS}'][0]
  dots = one.kind == 'dots'
  axes.plot(
    *zip(*one.points, strict=True),
    color=colour,
    label=one.name[:_LEGEND] or '_',  # names with _ are not in the legend
    drawstyle='steps-post' if one.kind == 'step' else 'default',
    linestyle='none' if dots else '--' if one.dashed else '-',
    marker='' if one.kind == 'curve' or len(one.points) > 60 else 'o',
    zorder=2.2 if dots else 2,
  )
  for x, low, high in one.ranges:
    axes.vlines(x, low, high, color=colour, alpha=0.5)
  for point, label in zip(one.points, one.labels, strict=False):
    ground = {'facecolor': _PAPER, 'edgecolor': 'none', 'pad': 0.5, 'alpha': 0.6}  # between lines and dots
    where = {'xytext': (0, -12), 'textcoords': 'offset points', 'ha': 'center', 'zorder': 2.1}
    axes.annotate(label, point, size=8, color=_MUTED, bbox=ground, **where)
    axes.margins(0.1)


def _finite(one: Series, most: float) -> Series:
  """Its points that are finite, those above `most` at that y."""
  kept = [i for i, point in enumerate(one.points) if all(map(math.isfinite, point))]
  points = [(x, min(y, most)) for x, y in (one.points[i] for i in kept)]
  return one._replace(points=points, labels=[one.labels[i] for i in kept] if one.labels else ())


def line_chart(
  title: str,
  names: tuple[str, str],
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
  drawn = [s for s in (_finite(s, most) for s in series) if s.points]
  levels = [level for level in levels if math.isfinite(level[0])]

  def draw(figure: Any, axes: Any) -> None:
    from matplotlib import ticker

    for one in drawn:
      _draw(axes, one)
    for x in x_range:
      axes.axvline(x, alpha=0)
    if log:
      axes.set_yscale('log')
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
      axes.yaxis.set_major_formatter(number)
    axes.xaxis.get_major_locator().set_params(integer=integer)
    if categories:
      most_letters = max(4, 60 // len(categories))
      axes.set_xticks(range(len(categories)), [name[:most_letters] for name in categories])
    for value, _ in marks:
      axes.axvline(value, color=_MUTED, linestyle=':', linewidth=1)
    for value, _ in levels:
      axes.axhline(value, color=_INK, linestyle='--', linewidth=0.8)
    if marks:
      axes.margins(y=0.15)  # their names are above the curves
    axes.autoscale_view()
    _name_lines(axes, marks, vertical=True)
    _name_lines(axes, levels, vertical=False)

  return _svg(title, names, height, draw) if drawn else ''


def bar_chart(title: str, unit: str, widths: dict[str, list[int]], colour: int, height: int) -> str:
  """Bars of the layers' widths before and after, the latter drawn over the former, by names of the legend."""

  def draw(figure: Any, axes: Any) -> None:
    for (name, bars), shade in zip(widths.items(), ('line', f'c{colour}'), strict=True):
      axes.bar(range(len(bars)), bars, 0.84, color=PALETTE[shade][0], label=name)
    for axis in (axes.xaxis, axes.yaxis):
      axis.get_major_locator().set_params(integer=True)

  return _svg(title, ('layer', unit), height, draw)


def axis_end(values: Iterable[float]) -> float:
  """Where an axis or a scale ends: 4 times the third quartile; a few values far above flatten the others."""
  known = sorted(value for value in values if math.isfinite(value))
  return 4 * known[3 * len(known) // 4] if known and known[0] >= 0 else math.inf


def heat_map(
  title: str, columns: Sequence[Sequence[float]], steps: Sequence[int], most: float = math.inf
) -> str:
  """Layers (rows, 0 on top) × steps (columns) and the scale; values above `most` have its colour."""
  rows = np.array(columns, np.float64).T
  rows[~np.isfinite(rows)] = np.nan

  def draw(figure: Any, axes: Any) -> None:
    high = np.nanmax(rows)
    limits = {'vmin': np.nanmin(rows), 'vmax': min(high, most)}
    image = axes.imshow(rows, aspect='auto', interpolation='none', **limits)
    axes.grid(False)
    scale = figure.colorbar(image, ax=axes, extend='max' if high > most else 'neither')
    scale.solids.set_rasterized(True)
    scale.outline.set_visible(False)
    scale.ax.grid(False)
    every = -(-len(steps) // 8)
    axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    axes.yaxis.get_major_locator().set_params(integer=True)

  return _svg(title, ('pruning step', 'layer'), 250, draw) if np.isfinite(rows).any() else ''
