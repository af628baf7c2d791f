"""Writes PIQA, OpenBookQA and LAMBADA as tasks of lm-evaluation-harness on local files.

    python -m scripts.local_tasks DATASETS [directory, by default data/tasks]

    local_piqa        piqa/valid.jsonl and valid-labels.lst
    local_openbookqa  openbookqa/test.tsv
    local_lambada     lambada/lambada_test.jsonl

Prompts and metrics are those of the harness's piqa, openbookqa and lambada_openai. Use them with

    --config.evaluate.tasks_path=data/tasks --config.evaluate.tasks=local_piqa,local_openbookqa,local_lambada
"""

import csv
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from adapt_jax.models.files import write_text

_CHOICE = {'output_type': 'multiple_choice', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]}
_FIELDS: dict[str, dict[str, Any]] = {
  'piqa': _CHOICE
  | {
    'doc_to_text': 'Question: {{goal}}\nAnswer:',
    'doc_to_choice': '{{[sol1, sol2]}}',
    'doc_to_target': 'label',
  },
  'openbookqa': _CHOICE
  | {'doc_to_text': '{{question}}', 'doc_to_choice': '{{choices}}', 'doc_to_target': 'label'},
  'lambada': {
    'output_type': 'loglikelihood',
    'doc_to_text': "{{text.split(' ')[:-1]|join(' ')}}",
    'doc_to_target': "{{' '+text.split(' ')[-1]}}",
    'metric_list': [{'metric': 'acc'}, {'metric': 'perplexity'}],
  },
}
TASKS = tuple(_FIELDS)


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  if not 1 <= len(arguments) <= 2:
    print('local_tasks: name the directory of the data sets, and maybe one to write to', file=sys.stderr)
    return 2
  root = pathlib.Path(__file__).resolve().parent.parent
  target = pathlib.Path(arguments[1]) if arguments[1:] else root / 'data/tasks'
  try:
    write_tasks(pathlib.Path(arguments[0]), target)
  except (OSError, ValueError) as error:
    print(f'local_tasks: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  return 0


def write_tasks(data: pathlib.Path, target: pathlib.Path) -> None:
  """Writes a task file and the questions of each task to `target`; all data sets are read first.

  Raises OSError if a data set is missing, and ValueError if it has another format.
  """
  rows = {name: _rows(name, data) for name in TASKS}
  target.mkdir(parents=True, exist_ok=True)
  for name, found in rows.items():
    file = target.resolve() / f'{name}.jsonl'
    write_text(file, ''.join(json.dumps(row) + '\n' for row in found))
    fields = {
      'task': f'local_{name}',
      'dataset_path': 'json',
      'dataset_kwargs': {'data_files': {'validation': str(file)}},
      'validation_split': 'validation',
    }
    write_text(target / f'{name}.yaml', yaml.safe_dump(fields | _FIELDS[name]))


def _rows(name: str, data: pathlib.Path) -> list[dict[str, Any]]:
  try:
    return list(_READ[name](data))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'the files of {name} in {data} are not in its published format: {error!r}') from None


def _json_lines(file: pathlib.Path) -> Iterator[Any]:
  # Not splitlines(), which also splits at separators that stand within JSON's strings.
  for line in file.read_text(encoding='utf-8').strip().split('\n'):
    yield json.loads(line)


def _piqa(data: pathlib.Path) -> Iterator[dict[str, Any]]:
  labels = (data / 'piqa/valid-labels.lst').read_text().split()
  for row, label in zip(_json_lines(data / 'piqa/valid.jsonl'), labels, strict=True):
    yield {name: row[name] for name in ('goal', 'sol1', 'sol2')} | {'label': int(label)}


def _openbookqa(data: pathlib.Path) -> Iterator[dict[str, Any]]:
  with open(data / 'openbookqa/test.tsv', encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file, delimiter='\t'):
      parts = re.split(r'\s*\(([A-D])\)\s*', row['Choices'])
      letters, choices = parts[1::2], parts[2::2]
      label = letters.index(row['Answer Key'].strip())
      yield {'question': row['Question Stem'], 'choices': choices, 'label': label}


def _lambada(data: pathlib.Path) -> Iterator[dict[str, Any]]:
  for row in _json_lines(data / 'lambada/lambada_test.jsonl'):
    yield {'text': row['text']}


_READ: dict[str, Callable[[pathlib.Path], Iterator[dict[str, Any]]]] = {
  'piqa': _piqa,
  'openbookqa': _openbookqa,
  'lambada': _lambada,
}

if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
