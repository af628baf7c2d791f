"""PIQA, OpenBookQA and LAMBADA as tasks of the harness, from files in their original formats."""

import json

import pytest

from scripts import local_tasks


@pytest.fixture
def data(tmp_path):
  """The three data sets, two rows each, in the format of their authors."""
  piqa, openbookqa, lambada = (tmp_path / name for name in ('piqa', 'openbookqa', 'lambada'))
  for folder in (piqa, openbookqa, lambada):
    folder.mkdir()
  goals = [{'goal': f'Open box {i}', 'sol1': 'lift', 'sol2': 'push'} for i in range(2)]
  (piqa / 'valid.jsonl').write_text('\n'.join(map(json.dumps, goals)) + '\n')
  (piqa / 'valid-labels.lst').write_text('1\n0\n')
  (openbookqa / 'test.tsv').write_text(
    'ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n'
    '1\tFog is near\t(A) a marsh (B) a tundra (C) the plains (D) a desert\tFog is near …\tA\n'
    '2\tA plant (green) needs\t(A) salt (B) light (C) noise (D) sand\tA plant …\tB\n'
  )
  # U+2028 separates lines, but not those of JSON.
  (lambada / 'lambada_test.jsonl').write_text('{"text": "He saw the dog"}\n{"text": "She\u2028sat down"}\n')
  return tmp_path


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_is_the_one_of_its_label(data, tmp_path):
  assert local_tasks.main([str(data), str(tmp_path / 'tasks')]) == 0
  assert [row['label'] for row in rows(tmp_path / 'tasks/piqa.jsonl')] == [1, 0]
  found = [(r['choices'][r['label']], len(r['choices'])) for r in rows(tmp_path / 'tasks/openbookqa.jsonl')]
  assert found == [('a marsh', 4), ('light', 4)]
  assert [r['text'] for r in rows(tmp_path / 'tasks/lambada.jsonl')] == [
    'He saw the dog',
    'She\u2028sat down',
  ]


def test_the_harness_asks_as_in_its_own_tasks(data, tmp_path):
  tasks = pytest.importorskip('lm_eval.tasks', reason='the extra eval is not installed')
  assert local_tasks.main([str(data), str(tmp_path / 'tasks')]) == 0
  manager = tasks.TaskManager(include_path=str(tmp_path / 'tasks'), include_defaults=False)
  names = [f'local_{name}' for name in local_tasks.TASKS]
  found = manager.load(names)['tasks']
  piqa, openbookqa, lambada = ((task, next(iter(task.eval_docs))) for task in map(found.get, names))

  def asked(task, row):
    choices = task.doc_to_choice(row) if task.OUTPUT_TYPE == 'multiple_choice' else None
    return task.doc_to_text(row), choices, task.doc_to_target(row)

  assert asked(*piqa) == ('Question: Open box 0\nAnswer:', ['lift', 'push'], 1)
  assert asked(*openbookqa) == ('Fog is near', ['a marsh', 'a tundra', 'the plains', 'a desert'], 0)
  assert asked(*lambada) == ('He saw the', None, ' dog')


@pytest.mark.parametrize(
  ('file', 'text'),
  [
    ('piqa/valid-labels.lst', None),
    ('lambada/lambada_test.jsonl', None),
    ('piqa/valid-labels.lst', '1\n'),
    ('openbookqa/test.tsv', 'ID\tQuestion Stem\tChoices\tAnswer Key\n1\tFog is near\n'),
    ('lambada/lambada_test.jsonl', '["He saw the dog"]\n'),
  ],
)
def test_a_data_set_that_is_absent_or_of_another_format_is_named(data, tmp_path, capsys, file, text):
  (data / file).unlink()
  if text:
    (data / file).write_text(text)
  assert local_tasks.main([str(data), str(tmp_path / 'tasks')]) == 2
  message = capsys.readouterr().err
  assert file.split('/')[0] in message and message.count('\n') == 1
  assert not (tmp_path / 'tasks').exists()
