"""report.html and the README's picture: what a reader looks for is there, and every drawing is sound."""

import html.parser
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from adapt_jax.reports import charts
from adapt_jax.reports.run_page import render, write
from scripts import plot_report

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS, TOKENS = 4, 128
COMMAND = 'python main.py --config=a.py --config.model.source="<i>&\'x\'" --workdir=out'
TARGETS = [900_000, 800_000]
ENDS = [4, 12]  # training steps
SVG = re.compile(r'<svg .*?</svg>', re.DOTALL)


def stage_row(stage: int) -> dict[str, Any]:
  return {
    'stage': stage,
    'target': TARGETS[stage - 1],
    'params': TARGETS[stage - 1] - 321,
    'perplexity_pruned': 40.25 + stage,
    'perplexity_recovered': 30.5 + stage,
    'tokens': TOKENS * (ENDS[0] if stage == 1 else ENDS[1] - ENDS[0]),
    'seconds': 100.4 * stage,
    'num_heads': [8] * LAYERS,
    'num_kv_heads': [4, 4, 4, 4 - stage],
    'ffn': [96, 90, 80 - stage, 70],
  }


def make_report() -> dict[str, Any]:
  rows = [stage_row(1), stage_row(2)]
  return {
    'model': {
      'source': 'data/a<i>&"c".gguf',
      'params_before': 1_000_000,
      'params_after': rows[-1]['params'],
      'params_target': TARGETS[-1],
      'num_kv_heads': [4] * LAYERS,
      'ffn': [96] * LAYERS,
    },
    'perplexity': {'dense': 28.75, 'pruned': 42.25, 'recovered': 32.5, 'definition': 'exp of <the mean>'},
    'schedule': {'targets': TARGETS, 'tokens_per_step': TOKENS, 'train_steps': ENDS[-1]},
    'stages': rows,
    'compiles': {'scoring': 1, 'training': 2, 'evaluation': 3},
    'seconds': 345.6,
    'versions': {'python': '3.11.7', 'jax': '0.10.2'},
  }


def pruning(stage: int, step: int) -> dict[str, Any]:
  row = stage_row(stage)
  return {
    'event': 'prune',
    'stage': stage,
    'step': step,
    'params': row['params'] + (50_000 if step % 2 else 0),
    'loss': 3.5,
    'layer_importance': [-0.001, -0.95, -0.9 - step / 100, -0.99],
    'sparsity': [0.01 * step, 0.02 * step, 0.03 * step, 0.04 * step],
    'kv_groups': row['num_kv_heads'],
    'ffn': row['ffn'],
  }


def evaluation(of: str, value: float, stage: int = 0) -> dict[str, Any]:
  return {'event': 'evaluate', 'of': of, 'stage': stage, 'step': 0, 'perplexity': value}


def make_events(train: bool = True) -> list[dict[str, Any]]:
  events, step = [evaluation('dense', 28.75)], 0
  for stage, end in enumerate(ENDS, 1):
    events += [pruning(stage, 2 * stage - 1), pruning(stage, 2 * stage)]
    events.append(evaluation('pruned', stage_row(stage)['perplexity_pruned'], stage))
    while train and step < end:
      step += 1
      loss = {'loss': 3.0 + 1 / step, 'gradient_norm': 2.0, 'learning_rate': 1e-4 * step}
      events.append({'event': 'train', 'stage': stage, 'step': step} | loss)
    if train:
      events.append(evaluation('recovered', stage_row(stage)['perplexity_recovered'], stage))
  return events


def complete_page() -> str:
  return render(make_report(), make_events(), command=COMMAND, running=False)


def partial_page() -> str:
  """Stage 1 is pruned, not yet recovered; nothing of the end is known."""
  whole = make_report()
  row = {k: whole['stages'][0][k] for k in ('stage', 'target', 'params', 'perplexity_pruned', 'seconds')}
  report = {k: whole[k] for k in ('model', 'schedule')} | {'perplexity': {'dense': 28.75}, 'stages': [row]}
  del report['model']['params_after']
  events = make_events()
  return render(report, events[: events.index(pruning(2, 3)) - ENDS[0] - 1], command=COMMAND, running=True)


def barest_page() -> str:
  """Before the first event."""
  report = {'model': {'source': 'a', 'params_before': 1_000_000}}
  return render(report, [], command=COMMAND, running=True)


def pruned_page() -> str:
  report = make_report()
  report['perplexity']['recovered'] = None
  report['stages'] = [r | {'perplexity_recovered': None, 'tokens': 0} for r in report['stages']]
  return render(report, make_events(train=False), command=COMMAND, running=False)


def unmeasured_page() -> str:
  """No text to evaluate on."""
  report, events = make_report(), [e for e in make_events() if e['event'] != 'evaluate']
  report['perplexity'] = {'dense': None, 'pruned': None, 'recovered': None}
  report['stages'] = [r | {'perplexity_pruned': None, 'perplexity_recovered': None} for r in report['stages']]
  return render(report, events, command=COMMAND, running=False)


def overflowing_page() -> str:
  """Figures that are not finite, as a pruning that goes too far gives them."""
  report, events = make_report(), make_events()
  report['perplexity']['pruned'] = report['stages'][1]['perplexity_pruned'] = math.inf
  (last,) = [e for e in events if e.get('of') == 'pruned' and e['stage'] == 2]
  last['perplexity'] = math.inf
  events[1]['layer_importance'][1] = math.nan
  return render(report, events, command=COMMAND, running=False)


def long_page() -> str:
  """More steps, and a perplexity over more decades, than are drawn one by one."""
  report, events = make_report(), make_events()
  last = [
    {'event': 'train', 'stage': 2, 'step': ENDS[1] + i, 'loss': 3.0, 'learning_rate': 0.1}
    for i in range(1, 999)
  ]
  report['schedule']['train_steps'] = ENDS[1] + 998
  return render(report, [*events, *last, evaluation('recovered', 4e4, 2)], command=COMMAND, running=False)


PAGES = (complete_page, partial_page, barest_page, pruned_page, unmeasured_page, overflowing_page, long_page)


class Reader(html.parser.HTMLParser):
  """The text of a page, and its tags; fails where tags do not nest."""

  def __init__(self, page: str) -> None:
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.texts: list[str] = []
    self.hovers: list[str] = []
    self.rows: list[list[str]] = []
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
    if tag != 'meta':
      self.open.append(tag)

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag

  def handle_data(self, data: str) -> None:
    if self.open and self.open[-1] == 'title' and 'svg' in self.open:
      self.hovers.append(data)
    elif self.open and self.open[-1] != 'style':
      self.texts.append(data)
    if self.open and self.open[-1] in ('td', 'th'):
      self.rows[-1][-1] = data

  @property
  def text(self) -> str:
    return '\n'.join(self.texts)


def drawings(page: str) -> dict[str, ElementTree.Element]:
  """The page's charts by their titles."""
  found = [ElementTree.fromstring(svg) for svg in SVG.findall(page)]
  return {svg.attrib['aria-label']: svg for svg in found}


def numbers(text: str) -> list[float]:
  return [float(x) for x in re.findall(r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?', text)]


def assert_inside(svg: ElementTree.Element) -> None:
  """Every coordinate is a number within the viewBox, and so is the text, at 5.5 pixels a letter."""
  _, _, width, height = numbers(svg.attrib['viewBox'])
  for element in svg.findall('.//'):
    at = element.attrib
    horizontal = [float(at[k]) for k in ('x', 'x1', 'x2', 'cx') if k in at]
    vertical = [float(at[k]) for k in ('y', 'y1', 'y2', 'cy') if k in at]
    if 'width' in at:
      assert float(at['width']) >= 0 and float(at['height']) >= 0
      horizontal.append(horizontal[0] + float(at['width']))
      vertical.append(vertical[0] + float(at['height']))
    if 'text-anchor' in at and 'transform' not in at:
      wide = 5.5 * len(element.text or '')
      before = {'start': 0.0, 'middle': wide / 2, 'end': wide}[at['text-anchor']]
      horizontal += [horizontal[0] - before, horizontal[0] - before + wide]
    for command, inside in re.findall(r'([MLHV])([^MLHV]*)', at.get('d', '')):
      found = numbers(inside)
      assert len(found) == (1 if command in 'HV' else 2), at['d']
      horizontal += found[:1] if command in 'MLH' else []
      vertical += found[-1:] if command in 'MLV' else []
    assert all(-0.1 <= x <= width + 0.1 for x in horizontal), (at, element.text)
    assert all(-0.1 <= y <= height + 0.1 for y in vertical), at


@pytest.mark.parametrize('make', PAGES)
def test_a_page_is_sound_and_needs_nothing_else(make: Callable[[], str]) -> None:
  page = make()
  reader = Reader(page)
  for tag, attributes in reader.tags:
    assert tag not in ('script', 'link', 'img', 'iframe', 'object', 'image', 'use', 'foreignobject')
    assert not {'src', 'href', 'xlink:href', 'onload', 'style'} & attributes.keys()
    for name, value in attributes.items():
      assert not re.search(r'\b(?:nan|none|inf)\b', (value or '').lower()), (tag, name, value)
  assert not re.search(r'https?://|url\(|@import', page)
  for svg in drawings(page).values():
    assert_inside(svg)


@pytest.mark.parametrize('make', PAGES)
def test_what_the_user_wrote_is_escaped(make: Callable[[], str]) -> None:
  page = make()
  assert COMMAND in Reader(page).texts
  assert '<i>' not in page


def test_a_complete_page_has_every_figure() -> None:
  reader = Reader(complete_page())
  assert reader.rows == [
    ['stage', 'parameters', 'of dense', 'perplexity pruned', 'recovered', 'tokens', 'seconds'],
    ['dense', '1,000,000', '100.0 %', '', '28.75', '', ''],
    ['1', '899,679', '90.0 %', '41.25', '31.50', '512', '100'],
    ['2', '799,679', '80.0 %', '42.25', '32.50', '1,024', '201'],
  ]
  for wanted in (
    'data/a<i>&"c".gguf',
    'finished, 2 stages',
    '28.75 → 42.25 → 32.50',
    '1,000,000 → 799,679',
    'target 800,000',
    'scoring 1, training 2, evaluation 3',
    '346 s',
    'python 3.11.7, jax 0.10.2',
    'exp of <the mean>',
  ):
    assert wanted in reader.text, wanted
  assert 'http-equiv' not in complete_page()


def test_pointing_at_a_mark_shows_its_value() -> None:
  hovers = Reader(complete_page()).hovers
  for wanted in (
    'stage 2 pruned: 42.250',
    'stage 1, step 4, 512 tokens: 3.25',
    'stage 2, step 12, 1,536 tokens: 0.0012',
    'stage 2, step 4: 799,679 parameters, 80.0 %, calibration loss 3.500',
    'step 4, layer 2: -0.94',
    'step 4, layer 3: 0.16',
    'layer 2: 96 → 79 channels',
    'layer 2: 79 → 78 channels',
    'layer 3: 4 → 3 KV heads',
    'layer 3: 3 → 2 KV heads',
  ):
    assert wanted in hovers, wanted


def marks(svg: ElementTree.Element) -> list[float]:
  found = [e.attrib for e in svg.iter('line') if e.attrib['class'] == 'mark']
  assert all(at['x1'] == at['x2'] for at in found)
  return [float(at['x1']) for at in found]


def places(svg: ElementTree.Element) -> dict[str, float]:
  """x of the dots by what they show."""
  return {str(circle[0].text): float(circle.attrib['cx']) for circle in svg.iter('circle')}


def test_prunings_are_marked_where_they_happened() -> None:
  found = drawings(complete_page())
  loss, perplexity = found['Training loss'], found['Perplexity on held-out text']
  (fourth,) = [x for hover, x in places(loss).items() if ', step 4,' in hover]
  (last,) = [x for hover, x in places(loss).items() if ', step 12,' in hover]
  start, second = marks(loss)
  assert second == fourth
  assert second - start == pytest.approx((last - start) * ENDS[0] / ENDS[1], abs=0.05)
  assert marks(found['Learning rate']) == marks(perplexity) == [start, second]
  assert places(perplexity)['stage 1 recovered: 31.500'] == second
  assert places(perplexity)['stage 2 pruned: 42.250'] == second
  budget = found['Parameters and the targets of the stages']
  (before,) = [x for hover, x in places(budget).items() if 'stage 1, step 2:' in hover]
  assert marks(budget)[1] == before


def test_a_partial_page_shows_what_is_known() -> None:
  page = partial_page()
  reader = Reader(page)
  assert reader.rows[2:] == [['1', '899,679', '90.0 %', '41.25', '–', '–', '100']]
  assert 'running, stage 1 of 2: evaluated the pruned model' in reader.text
  assert 'target 2: 800k' in reader.text  # of a stage that is yet to come
  assert '1,000,000 → 899,679' in reader.text
  assert 'http-equiv="refresh"' in page
  assert 'MLP channels, after stage 1' in drawings(page) and 'MLP channels, after stage 2' not in drawings(
    page
  )
  assert 'Training loss' not in drawings(page)


def test_a_pruning_that_goes_on_is_no_stage_done() -> None:
  report, events = make_report(), make_events()
  report['stages'] = report['stages'][:1]
  page = render(report, events[: events.index(pruning(2, 3)) + 1], command='', running=True)
  assert 'running, stage 2 of 2: pruning, step 3 done' in page
  assert 'MLP channels, stage 2 so far' in drawings(page)
  assert '1,000,000 → 849,679' in page


def test_without_training_perplexity_goes_by_stage() -> None:
  reader, found = Reader(pruned_page()), drawings(pruned_page())
  assert '28.75 → 42.25' in reader.texts
  assert 'stage 2 pruned: 42.250' in reader.hovers
  assert [row[4] for row in reader.rows[2:]] == ['–', '–']
  assert not {'Training loss', 'Learning rate'} & found.keys()


def test_without_evaluation_there_is_no_perplexity_chart() -> None:
  assert 'Perplexity on held-out text' not in drawings(unmeasured_page())
  assert 'Training loss' in drawings(unmeasured_page())


def test_a_long_run_is_thinned_and_says_so() -> None:
  found = drawings(long_page())
  svg = found['Training loss (means of 5 steps)']
  assert len(list(svg.iter('circle'))) <= 260
  assert 'mean of steps 5 to 9' in ElementTree.tostring(svg, encoding='unicode')


@pytest.mark.parametrize(
  ('low', 'high', 'log', 'expected'),
  [
    (0, 49152, False, ['0', '20k', '40k']),
    (1.06e8, 1.36e8, False, ['110M', '120M', '130M']),
    (0, 2e-4, False, ['0', '0.5e-4', '1e-4', '1.5e-4', '2e-4']),
    (0, 3.1, False, ['0', '1', '2', '3']),
    (28, 30_000, True, ['0.1k', '1k', '10k']),
    (4, 90, True, ['5', '10', '20', '50']),
  ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[str]) -> None:
  assert [label for _, label in charts.labelled(charts.ticks(low, high, 4, log))] == expected


def test_one_point_and_one_layer_are_drawn_whatever_their_names() -> None:
  a, two = '<&"', ('<x>', '&y')
  for svg in (
    charts.line_chart(a, two, [charts.Series(a, [(0, 0, a)])], marks=[(0, a)], levels=[(1, a)]),
    charts.bar_chart(a, a, [0], [0], two, 0, 180),
    charts.heat_map(a, [[1.0]], [1]),
  ):
    assert_inside(ElementTree.fromstring(svg))
  assert charts.line_chart('a', ('x', 'y'), [charts.Series('s', [(0, math.nan, '')])]) == ''


def rgb(colour: str) -> list[float]:
  """Linear light of #rrggbb, as WCAG 2 has it."""
  shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]


def brightness(colour: str) -> float:
  return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), rgb(colour), strict=True))


@pytest.mark.parametrize(('colours', 'paper'), [(charts.ON_LIGHT, '#ffffff'), (charts.ON_DARK, '#1a2029')])
def test_colours_stand_out_from_the_paper_and_differ(colours: tuple[str, ...], paper: str) -> None:
  assert len(set(colours)) == charts.COLOURS >= 8
  for colour in colours:
    low, high = sorted(map(brightness, (colour, paper)))
    assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2 for graphics
  assert all(f'.line{i}{{stroke:{c};' in charts.LIGHT for i, c in enumerate(charts.ON_LIGHT))


def test_a_long_legend_wraps_and_stays_in_the_picture() -> None:
  names = [f'method {"abcdefgh"[: i + 1]}, distance {i}' for i in range(8)] + ['x' * 200]
  series = [charts.Series(n, [(0, i + 1, n), (1, i + 2, n)], i % charts.COLOURS) for i, n in enumerate(names)]
  svg = ElementTree.fromstring(charts.line_chart('a', ('x', 'y'), series, log=True))
  assert_inside(svg)
  texts = [text for text in svg.findall('text') if (text.text or '').startswith(('method', 'x'))]
  assert [t.text for t in texts[:-1]] == names[:-1] and (texts[-1].text or '').endswith('…')
  rows = [float(text.attrib['y']) for text in texts]
  assert rows == sorted(rows) and len(set(rows)) > 2
  plot = svg.find('g')
  assert plot is not None
  down = numbers(plot.attrib['transform'])[1]
  tops = [float(line.attrib['y1']) + down for line in plot.iter('line')]
  assert min(tops) > max(rows) and numbers(svg.attrib['viewBox'])[3] == 250 + down


def test_categories_and_ranges() -> None:
  series = charts.Series('', [(0, 3, 'a'), (1, 4, 'b')], ranges=[(1, 2, 9)])
  names = ['first', 'a second name that is far too long to fit in between the other two', 'third']
  svg = ElementTree.fromstring(charts.line_chart('a', ('x', 'y'), [series], categories=names))
  assert_inside(svg)
  texts = [text.text or '' for text in svg.iter('text')]
  assert 'first' in texts and 'third' in texts and any(text.startswith('a second') for text in texts)
  (bar,) = (line for line in svg.iter('line') if 'range' in line.attrib['class'])
  (dot,) = (d for d in svg.iter('circle') if d.attrib['cx'] == bar.attrib['x1'])
  assert float(bar.attrib['y2']) < float(dot.attrib['cy']) < float(bar.attrib['y1'])


def test_a_chart_as_a_file() -> None:
  chart = charts.line_chart('a < b', ('x', 'y'), [charts.Series('', [(0, 1, ''), (1, 2, '')])])
  svg = ElementTree.fromstring(charts.picture(chart))
  assert svg.tag == '{http://www.w3.org/2000/svg}svg' and svg.attrib['aria-label'] == 'a < b'
  assert svg.attrib['viewBox'] == f'0 0 {svg.attrib["width"]} {svg.attrib["height"]}'
  assert svg[0].text == charts.LIGHT and svg[1].attrib['fill'] == '#ffffff'


def test_write_says_when(tmp_path: pathlib.Path) -> None:
  write(tmp_path / 'report.html', make_report(), make_events(), command=COMMAND, running=False)
  text = Reader((tmp_path / 'report.html').read_text(encoding='utf-8')).text
  assert re.search(r'finished, 2 stages \(page written \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)', text)


def test_the_picture_names_what_is_missing(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  report = make_report()
  del report['model']['ffn']
  (tmp_path / 'report.json').write_text(json.dumps(report))
  assert plot_report.main(['', str(tmp_path), str(tmp_path / 'out.svg')]) == 2
  assert plot_report.main(['', str(tmp_path / 'absent'), str(tmp_path / 'out.svg')]) == 2
  (tmp_path / 'report.json').write_text('{"models": {}}')  # of mode bench
  assert plot_report.main(['', str(tmp_path), str(tmp_path / 'out.svg')]) == 2
  assert capsys.readouterr().err.count('error: ') == 3
  assert not (tmp_path / 'out.svg').exists()


def test_the_dense_model_belongs_to_no_stage() -> None:
  """Its evaluation comes before the first stage, which is the one that goes on."""
  report = {k: v for k, v in make_report().items() if k not in ('stages', 'schedule')}
  text = render(report, [evaluation('dense', 20.0)], command=COMMAND, running=True)
  assert 'running, stage 1 of 1: evaluated the dense model' in text


def test_the_page_says_what_was_done_with_which_settings_and_exports() -> None:
  report = make_report() | {
    'prune': {'method': 'adapt', 'layer_distance': 'cosine', 'calibration': {'source': ['a.txt', 'b.txt']}},
    'exports': {'hf': {'bytes': 12_345_678, 'type': 'bfloat16', 'logit_difference': 0.25, 'same_token': 1.0}},
  }
  events = [e | ({'tokens_per_second': 64.0} if e['event'] == 'train' else {}) for e in make_events()]
  text = render(report, events, command=COMMAND, running=False)
  assert 'pruned to 80.0% and recovered</h1>' in text
  for words in ('prune.calibration.source', 'a.txt, b.txt', '12.3', 'bfloat16', 'tokens per second'):
    assert words in text
  assert '1 - cos(input, output)' in text


def test_colours_of_a_map_are_linear() -> None:
  """One far value: those near each other look alike."""
  drawn = charts.heat_map('map', [[0.0, 0.1, 100.0]], [1])
  cells = re.findall(r'<rect[^>]*?(?:fill|class|style)="([^"]+)"[^>]*><title>step', drawn)
  assert len(cells) == 3 and cells[0] == cells[1] != cells[2]


def test_what_the_method_decided_by_is_shown() -> None:
  report, events = make_report(), make_events()
  report['prune'] = {'method': 'obs', 'layer_distance': 'cosine'}
  for event in events:
    if event['event'] == 'prune':
      event['layer_cost'] = [1e-9, 2e-9, 3e-9, 5e-7]
  page = render(report, events, command=COMMAND, running=False)
  assert 'Median cost per parameter of the groups of a layer' in drawings(page)
  assert 'step 4, layer 3: 5e-07' in Reader(page).hovers
  colours = [
    rect.attrib['fill']
    for rect in drawings(page)['Median cost per parameter of the groups of a layer'].iter('rect')
  ]
  assert len(set(colours[:3])) == 3  # the layer far above does not flatten the others
  report['prune'] = {'method': 'adapt', 'layer_distance': 'cosine'}
  page = render(report, make_events(), command=COMMAND, running=False)
  assert 'Importance of the layers: 1 - cos(input, output)' in drawings(page)
  assert 'step 4, layer 2: 0.06' in Reader(page).hovers


def test_texts_before_and_after_are_side_by_side() -> None:
  example = {'text': 'web', 'prompt': 'Once <b>', 'dense': 'upon a time', 'result': 'was\na & b'}
  page = render(make_report() | {'examples': [example]}, make_events(), command=COMMAND, running=False)
  texts = Reader(page).texts
  assert 'web: … Once <b> …' in texts and 'upon a time' in texts and 'was\na & b' in texts
  assert 'Before and after' not in complete_page()
