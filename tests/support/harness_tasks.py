"""Task files on small local data, of every kind of request that lm-evaluation-harness makes."""

import json
import pathlib

QUESTIONS = [
  ('How do foxes jump?', ['over the lazy dog', 'under it, slowly and with many words besides'], 0),
  ('It was the best of', ['times', 'ends', 'two'], 0),
  ('What is the sum of two and three?', ['five', 'three', 'two', 'it was'], 0),
  ('The dog sleeps', ['on', 'off, and the fox jumps over it once more'], 0),
  ('', ['user', 'the worst'], 1),
  ('Which letter is first?', ['A', 'B', 'C', 'D'], 0),
  ('Which letter is last?', ['A', 'B', 'C', 'D'], 3),
]
TEXTS = [
  'The quick brown fox jumps over the lazy dog, and the dog sleeps on. It was the best of times.',
  'the sum',
  ' '.join(f'It was time number {i}, and the fox slept.' for i in range(12)),
]


def write_tasks(path: pathlib.Path) -> pathlib.Path:
  """Tasks toy_choice, toy_answer, toy_text, toy_write, and group toy of the first two; returns the path."""
  path.mkdir(parents=True, exist_ok=True)  # JSON is YAML
  rows = {
    'choice': [{'question': q, 'choices': c, 'label': label} for q, c, label in QUESTIONS],
    'answer': [{'context': q, 'answer': ' ' + c[label]} for q, c, label in QUESTIONS],
    'text': [{'text': text} for text in TEXTS],
  }
  for name, items in rows.items():
    (path / f'{name}.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
  tasks = {
    'choice': {
      'output_type': 'multiple_choice',
      'doc_to_text': '{{question}}',
      'doc_to_choice': '{{choices}}',
      'num_fewshot': 1,
      'doc_to_target': 'label',
      'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
    },
    'answer': {
      'output_type': 'loglikelihood',
      'doc_to_text': '{{context}}',
      'doc_to_target': '{{answer}}',
      'metric_list': [{'metric': 'perplexity'}, {'metric': 'acc'}],
    },
    'text': {
      'output_type': 'loglikelihood_rolling',
      'doc_to_text': '',
      'doc_to_target': '{{text}}',
      'metric_list': [{'metric': 'word_perplexity'}],
    },
    'write': {
      'output_type': 'generate_until',
      'doc_to_text': '{{context}}',
      'doc_to_target': '{{answer}}',
      'generation_kwargs': {'until': ['qu', 'e'], 'max_gen_toks': 40},
      'metric_list': [{'metric': 'exact_match'}],
    },
  }
  for name, task in tasks.items():
    file = 'answer' if name == 'write' else name
    data = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(path / f'{file}.jsonl')}}}
    common = {'task': f'toy_{name}', 'test_split': 'test', 'metadata': {'version': 1.0}}
    (path / f'{name}.yaml').write_text(json.dumps(common | data | task))
  group = {
    'group': 'toy',
    'task': ['toy_choice', 'toy_answer'],
    'aggregate_metric_list': [{'metric': 'acc', 'weight_by_size': True}],
  }
  (path / 'toy.yaml').write_text(json.dumps(group))
  return path
