"""The picture of what each token of recovery wins back."""

import json

import pytest

from scripts import plot_tokens


def write_cell(workdir, name, tokens, recovered):
  """A finished cell, with what the picture reads of its report."""
  text = {'dense': 10.0, 'pruned': 20.0, 'recovered': recovered}
  report = {'stages': [{'tokens': tokens // 2}, {'tokens': tokens - tokens // 2}], 'texts': {'web': text}}
  (workdir / 'cells' / name).mkdir(parents=True)
  (workdir / 'cells' / name / 'report.json').write_text(json.dumps(report))


def test_a_line_goes_from_the_pruned_model_through_the_cells_by_their_tokens(tmp_path):
  write_cell(tmp_path, 'long', 1001, 12.5)
  write_cell(tmp_path, 'base', 100, 15.0)
  assert plot_tokens.main([str(tmp_path), str(tmp_path / 'out.svg')]) == 0
  drawn = (tmp_path / 'out.svg').read_text()
  places = [
    drawn.index(f'<title>{point}')
    for point in ('0 tokens: 0.693', '100 tokens: 0.405', '1,001 tokens: 0.223')
  ]
  assert places == sorted(places)


@pytest.mark.parametrize('cells', [[], ['pruned only']])
def test_a_grid_without_recovered_models_is_refused_and_writes_nothing(tmp_path, capsys, cells):
  for name in cells:
    write_cell(tmp_path, name, 0, 0.0)
    file = tmp_path / 'cells' / name / 'report.json'
    report = json.loads(file.read_text())
    del report['texts']['web']['recovered']
    file.write_text(json.dumps(report))
  assert plot_tokens.main([str(tmp_path), str(tmp_path / 'out.svg')]) == 2
  assert capsys.readouterr().err.startswith('error: ')
  assert not (tmp_path / 'out.svg').exists()
