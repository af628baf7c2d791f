"""Charts as SVG text: lines, bars over layers, heat maps of layers × steps.

Each function returns one `<svg>`, for a page or picture that has LIGHT or DARK as its CSS. Hovering over a
mark shows its value (`<title>`); values that are not finite are left out.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, WIDTH - 12, 50, 38
_LETTER = 6.3  # approximate width of a letter in labels
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

Labelled = Sequence[tuple[float, str]]
Ints = Sequence[int]
Pair = tuple[str, str]


def _style(ink: str, muted: str, grid: str, paper: str, *series: str) -> str:
  rules = [
    f'.chart text{{fill:{muted};font:11px system-ui,sans-serif}}',
    f'.chart .name{{fill:{ink};font-size:13px;font-weight:600}}',
    f'.chart .over{{fill:{ink};paint-order:stroke;stroke:{paper};stroke-width:3px}}',
    f'.chart .grid{{stroke:{grid}}} .chart .was{{fill:{grid}}}',
    f'.chart .mark{{stroke:{muted};stroke-dasharray:2 3}} .chart .level{{stroke:{ink};stroke-dasharray:7 3}}',
    '.chart .range{stroke-opacity:.5}',
    # A wide invisible border makes a small dot easy to hover over.
    '.chart .dot{stroke-width:9;stroke-opacity:0;pointer-events:all} .chart .dot:hover{stroke-opacity:.35}',
  ]
  for i, colour in enumerate(series):
    rules.append(f'.chart .line{i}{{stroke:{colour};fill:none;stroke-width:1.6;stroke-linejoin:round}}')
    rules.append(f'.chart .fill{i}{{fill:{colour}}} .chart .dot.fill{i}{{stroke:{colour}}}')
  return '\n'.join(rules)


# Series 0, 1, …: blue, orange, green, violet, pink, teal, ochre, grey; on light and dark backgrounds.
ON_LIGHT = ('#1c64d8', '#c2410c', '#15803d', '#7c3aed', '#db2777', '#0891b2', '#946b00', '#3f3f46')
ON_DARK = ('#6ea8fe', '#fb8c4b', '#4ecb7d', '#b794f6', '#f77fbe', '#35d0e6', '#e9c83f', '#e4e4e7')
COLOURS = len(ON_LIGHT)  # distinct colours; further series reuse them, dashed
# CSS of the charts' classes.
LIGHT = _style('#1b2330', '#586374', '#dce1e8', '#ffffff', *ON_LIGHT)
DARK = _style('#e6eaf0', '#9aa7b8', '#333c49', '#1a2029', *ON_DARK)


class Series(NamedTuple):
  """One line. points: x, y and the hover text, '' to draw no dot; kind: line, step or dots.

  ranges: x, lowest and highest y of thin vertical bars, for the range over repetitions.
  dashed: whether the line is dashed; the legend notes it.
  """

  name: str
  points: Sequence[tuple[float, float, str]]
  colour: int = 0
  kind: str = 'line'
  ranges: Sequence[tuple[float, float, float]] = ()
  dashed: bool = False

  @property
  def legend(self) -> Pair:
    """CSS class and name."""
    return f'fill{self.colour}', self.name + (' (dashed)' if self.dashed else '')


class _Scale(NamedTuple):
  """Maps values low … high to pixels start … stop."""

  low: float
  high: float
  start: float
  stop: float
  log: bool = False

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      low, high, value = math.log(low), math.log(high), math.log(value)
    return round(self.start + (self.stop - self.start) * (value - low) / (high - low), 2)


def ticks(low: float, high: float, count: int, log: bool = False, integer: bool = False) -> list[float]:
  """About `count` round numbers within low … high (low < high)."""
  if log and high / low > 8:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if len(decades) < 4 else (1,)
    found = [m * 10.0**e for e in decades[:: -(-len(decades) // 6)] for m in mantissas]
    return [t for t in found if low <= t <= high]
  rough = 0.9 * (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
  step = float(math.ceil(step)) if integer else step
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
  """Ticks with labels in one unit: 0, 5k, 10k, or 0.5e-4, 1e-4."""
  largest = max(map(abs, values), default=0)
  power = math.floor(math.log10(largest) + 1e-9) if largest else 0
  units = ((1e9, 1e9, 'B'), (1e6, 1e6, 'M'), (1e4, 1e3, 'k'), (1e-2, 1, ''), (0, 10.0**power, f'e{power}'))
  unit, suffix = next((unit, suffix) for least, unit, suffix in units if largest >= least)
  return [(v, '0' if v == 0 else f'{v / unit:.6g}{suffix}') for v in values]


def _text(x: float, y: float, text: str, anchor: str = 'start', more: str = '') -> str:
  return f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
  return f'<line class="{kind}" x1="{x1:.5g}" y1="{y1:.5g}" x2="{x2:.5g}" y2="{y2:.5g}"/>'


def _rect(look: str, x: float, y: float, width: float, height: float, hover: str = '') -> str:
  inside = f'<title>{html.escape(hover)}</title>' if hover else ''
  return f'<rect {look} x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}">{inside}</rect>'


def _legend(legend: Sequence[Pair]) -> tuple[list[str], int]:
  """Marks and names of (class, name), and the height of the lines after the first."""
  parts, x, down, most = list[str](), float(_LEFT), 0, int((_RIGHT - _LEFT - 13) / _LETTER)
  for kind, name in legend:
    shown = name if len(name) <= most else name[: most - 1] + '…'
    width = 13 + _LETTER * len(shown)
    if x > _LEFT and x + width > _RIGHT:
      x, down = float(_LEFT), down + 14
    hover = name if shown != name else ''
    parts += [_rect(f'class="{kind}"', x, 22 + down, 9, 9, hover), _text(x + 13, 30.5 + down, shown)]
    x += width + 15
  return parts, down


def _svg(title: str, height: int, parts: Iterable[str], legend: Sequence[Pair] = ()) -> str:
  """The `<svg>` with its title and a legend of (class, name); a long legend makes it higher."""
  names, down = _legend(legend)
  head = [_text(2, 14, title, more=' class="name"'), *names]
  moved = [f'<g transform="translate(0 {down})">', *parts, '</g>'] if down else parts
  box = f'viewBox="0 0 {WIDTH} {height + down}"'
  start = f'<svg class="chart" role="img" aria-label="{html.escape(title)}" {box}>'
  return '\n'.join([start, *head, *moved, '</svg>'])


def picture(chart: str) -> str:
  """A chart as a separate SVG file, on white."""
  size = chart.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()
  start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
  head, rest = chart.replace('<svg ', start, 1).split('>', 1)
  return f'{head}>\n<style>{LIGHT}</style>\n<rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'


def _frame(x: _Scale, y: _Scale, x_ticks: Labelled, y_ticks: Labelled, names: Pair) -> list[str]:
  """Tick labels and names of both axes, and the base line."""
  middle = (y.start + y.stop) / 2
  return [
    *(_text(x.start - 5, y(t) + 4, label, 'end') for t, label in y_ticks),
    *(_text(x(t), y.start + 14, label, 'middle') for t, label in x_ticks),
    _line('grid', x.start, y.start, x.stop, y.start),
    _text((x.start + x.stop) / 2, y.start + 31, names[0], 'middle'),
    _text(11, middle, names[1], 'middle', f' transform="rotate(-90 11 {middle:.5g})"'),
  ]


def _categories(names: Sequence[str], x: _Scale) -> list[tuple[float, str]]:
  """One tick per name, with labels cut to the available width."""
  most = max(3, int((x.stop - x.start) / max(len(names), 1) / _LETTER))
  return [(float(i), name if len(name) <= most else name[: most - 1] + '…') for i, name in enumerate(names)]


def _axes(
  x: _Scale, y: _Scale, names: Pair, integer: tuple[bool, bool], categories: Sequence[str] = ()
) -> list[str]:
  x_ticks = _categories(categories, x) or labelled(ticks(x.low, x.high, 6, integer=integer[0]))
  y_ticks = labelled(ticks(y.low, y.high, round((y.start - y.stop) / 32), log=y.log, integer=integer[1]))
  lines = [_line('grid', x.start, y(t), x.stop, y(t)) for t, _ in y_ticks]
  return lines + _frame(x, y, x_ticks, y_ticks, names)


def _marks(marks: Labelled, x: _Scale, y: _Scale) -> list[str]:
  """Vertical lines; a label that would overlap the previous one is omitted."""
  parts, free = [], -math.inf
  for value, label in marks:
    parts.append(_line('mark', x(value), y.start, x(value), y.stop - 2))
    left = min(x(value), x.stop - _LETTER * len(label))
    if left >= free:
      parts.append(_text(left, y.stop - 4, label))
      free = left + _LETTER * (len(label) + 1)
  return parts


def _levels(levels: Labelled, line: Series, x: _Scale, y: _Scale) -> list[str]:
  """Horizontal lines, each labelled at the end that is further from the line chart."""
  parts, taken = [], list[float]()
  for value, label in levels:
    at = y(value)
    left = abs(line.points[0][1] - value) > abs(line.points[-1][1] - value)
    parts.append(_line('level', x.start, at, x.stop, at))
    if all(abs(at - other) > 13 for other in taken):
      place = x.start + 4 if left else x.stop - 2
      parts.append(_text(place, at - 4, label, 'start' if left else 'end', ' class="over"'))
      taken.append(at)
  return parts


def _series(series: Series, x: _Scale, y: _Scale) -> list[str]:
  places = [(x(px), y(py)) for px, py, _ in series.points]
  draw = 'H{:.5g}V{:.5g}' if series.kind == 'step' else 'L{:.5g} {:.5g}'
  path = 'M{:.5g} {:.5g}'.format(*places[0]) + ''.join(draw.format(*p) for p in places[1:])
  dashes = ' stroke-dasharray="6 3"' if series.dashed else ''
  parts = [f'<path class="line{series.colour}"{dashes} d="{path}"/>'] if series.kind != 'dots' else []
  parts += [
    _line(f'range line{series.colour}', x(at), y(low), x(at), y(high)) for at, low, high in series.ranges
  ]
  radius = 3.5 if series.kind == 'dots' else 2.3 if len(places) <= 60 else 0.8
  look = f'class="dot fill{series.colour}" r="{radius}"'
  for (px, py), (_, _, hover) in zip(places, series.points, strict=True):
    if hover:
      parts.append(f'<circle {look} cx="{px:.5g}" cy="{py:.5g}"><title>{html.escape(hover)}</title></circle>')
  return parts


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
  """Lines over x with vertical `marks` and horizontal `levels`; '' if there is no finite point.

  names: of x and y. x_range: values that the x axis includes. log: log y axis, for positive values only.
  integer: whole-number ticks of x. categories: names of x = 0, 1, …, instead of numbers. most: the y at which
  points above it are drawn; hovering shows their value.
  """
  drawn = [
    [(x, min(y, most), hover) for x, y, hover in s.points if math.isfinite(x) and math.isfinite(y)]
    for s in series
  ]
  series = [s._replace(points=points) for s, points in zip(series, drawn, strict=True) if points]
  if not series:
    return ''
  levels = [level for level in levels if math.isfinite(level[0])]
  xs = [p[0] for s in series for p in s.points] + [value for value, _ in marks] + list(x_range)
  ys = [p[1] for s in series for p in s.points] + [value for value, _ in levels]
  ys += [value for s in series for _, *ends in s.ranges for value in ends]
  xs += [-0.5, len(categories) - 0.5] if categories else []
  low, high = min(ys), max(ys)
  air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  span = (low / 1.1, high * 1.1) if log else (0.0 if 0 <= low < air else low - air, high + air)
  x = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, _RIGHT)
  y = _Scale(*span, height - _BOTTOM, _TOP, log)
  parts = _axes(x, y, names, (integer, False), categories) + _marks(marks, x, y)
  for one in series:
    parts += _series(one, x, y)
  parts += _levels(levels, series[0], x, y)
  return _svg(title, height, parts, [s.legend for s in series if s.name])


def bar_chart(title: str, unit: str, before: Ints, after: Ints, names: Pair, colour: int, height: int) -> str:
  """Bars of the layers' widths, `after` drawn over `before`; `names` label both in the legend."""
  x = _Scale(-0.5, len(after) - 0.5, _LEFT, _RIGHT)
  y = _Scale(0, max(*after, *before, 1) * 1.04, height - _BOTTOM, _TOP)
  wide = 0.84 * (x.stop - x.start) / len(after)
  parts = _axes(x, y, ('layer', unit), (True, True))
  for layer, widths in enumerate(zip(before, after, strict=True)):
    hover = f'layer {layer}: {widths[0]:,} → {widths[1]:,} {unit}'
    for kind, width in zip(('was', f'fill{colour}'), widths, strict=True):
      parts.append(_rect(f'class="{kind}"', x(layer) - wide / 2, y(width), wide, y.start - y(width), hover))
  return _svg(title, height, parts, [('was', names[0]), (f'fill{colour}', names[1])])


def _fill(share: float) -> str:
  i = min(int(4 * share), 3)
  mixed = [round(a + (b - a) * (4 * share - i)) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True)]
  return 'fill="#{:02x}{:02x}{:02x}"'.format(*mixed)


def axis_end(values: Iterable[float]) -> float:
  """Where an axis or a scale ends: 4 times the third quartile; a few values far above flatten the others."""
  found = sorted(value for value in values if math.isfinite(value))
  return 4 * found[3 * len(found) // 4] if found and found[0] >= 0 else math.inf


def heat_map(
  title: str, columns: Sequence[Sequence[float]], steps: Ints, height: int = 250, most: float = math.inf
) -> str:
  """Layers (rows, 0 on top) × steps (columns) and the scale; '' if nothing is finite.

  Colours are linear from the lowest to the highest value, or to `most`, whose colour higher values have too.
  """
  finite = [v for column in columns for v in column if math.isfinite(v)]
  if not finite:
    return ''
  low, high, above = min(finite), min(max(finite), most), max(finite) > most
  size = high - low
  layers, right = len(columns[0]), _RIGHT - 84
  x, y = _Scale(0, len(steps), _LEFT, right), _Scale(layers, 0, height - _BOTTOM, 24)
  parts = ['<g shape-rendering="crispEdges">']
  for i, column in enumerate(columns):
    for layer, value in enumerate(column):
      if math.isfinite(value):
        look = _fill((min(value, most) - low) / (size or 1))
        hover = f'step {steps[i]}, layer {layer}: {value:.4g}'
        parts.append(_rect(look, x(i), y(layer), x(i + 1) - x(i), y(layer + 1) - y(layer), hover))
  bar = _Scale(0, 24, y.start, y.stop)
  parts += [_rect(_fill((i + 0.5) / 24), right + 14, bar(i + 1), 11, bar(i) - bar(i + 1)) for i in range(24)]
  shown = [f'{"≥ " if above and i == 4 else ""}{low + size * i / 4:.3g}' for i in range(5)]
  parts += ['</g>', *(_text(right + 29, bar(6 * i) + 4, label) for i, label in enumerate(shown))]
  x_ticks = [(i + 0.5, str(steps[i])) for i in range(0, len(steps), -(-len(steps) // 8))]
  y_ticks = [(t + 0.5, f'{t:g}') for t in ticks(0, max(layers - 1, 1), 6, integer=True) if t < layers]
  return _svg(title, height, parts + _frame(x, y, x_ticks, y_ticks, ('pruning step', 'layer')))
