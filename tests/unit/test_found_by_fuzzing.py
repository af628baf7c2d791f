"""What the fuzzer (tests/fuzz) has found, each with the input that showed it."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import DistillOptions, ModelOptions, RunOptions, TrainOptions
from adapt_jax.data.documents import check_source
from adapt_jax.data.token_cache import Need, open_cache
from adapt_jax.export.hf import write_hf
from adapt_jax.generation.generator import check_prompts
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import export
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.training.teacher_cache import open_taught
from tests.support.helpers import UNIFORM, random_params, save_checkpoint, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer


def refused(function, *arguments) -> str:
  """The message, one line of printable text."""
  with pytest.raises(InputError) as error:
    function(*arguments)
  message = str(error.value)
  assert message.isprintable() and message
  return message


@pytest.fixture
def model(tmp_path):
  config = tiny_config('mistral', UNIFORM)
  save_checkpoint(tmp_path / 'model', config, random_params(config))
  return tmp_path / 'model'


@pytest.mark.parametrize('name', ['a\nb', '\x1b[2J', 'a\u2028b', 'x' * 100_000])
def test_a_name_from_a_file_does_not_break_the_line(model, name):
  save_file({name: np.zeros(4, np.float32)}, model / 'model.safetensors')
  message = refused(open_source, str(model))
  assert str(model) in message and len(message) <= 2100


def test_a_number_beyond_the_largest_float():
  values = {'train': {'weights': [10**400]}}
  assert refused(from_dict, values).startswith('train.weights = [1000')


def test_a_long_message_keeps_its_end():
  assert str(InputError('a' * 5000 + ': lower it')).endswith(': lower it')
  assert str(InputError('Größe = 5: lower it')) == 'Größe = 5: lower it'


@pytest.mark.parametrize(
  'field,value',
  [
    ('eos_token_id', 'x'),
    ('eos_token_id', [1, '2']),
    ('eos_token_id', [[1]]),
    ('eos_token_id', 1.5),
    ('eos_token_id', {}),
    ('temperature', 'hot'),
    ('top_k', 10**400),
    ('top_p', float('nan')),
    ('repetition_penalty', -1),
    ('repetition_penalty', 0),
  ],
)
def test_settings_of_generation_of_another_type(model, field, value):
  path = model / 'generation_config.json'
  path.write_text(json.dumps({field: value}))
  assert f'{path}: {field} = ' in refused(open_source, str(model))
  path.write_text(json.dumps({field: None}))
  open_source(str(model))


def test_texts_of_another_type_in_run_json(tmp_path):
  path = tmp_path / 'run.json'
  path.write_text(json.dumps({'mode': 'accel', 'config': {}, 'texts': 5}))
  with pytest.raises(InputError, match='run.json'):
    Workdir(str(tmp_path), {'mode': 'accel', 'config': {}}).claimed(lambda: {'train.source': 'a'}).__enter__()


@pytest.mark.parametrize('content', [{'mode': 'accel'}, {'mode': 'accel', 'config': [1]}])
def test_an_unfinished_run_without_options_is_not_exported(tmp_path, content):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'run.json').write_text(json.dumps(content))
  options = RunOptions(model=ModelOptions(source=str(tmp_path)))
  message = refused(export.run, options, Workdir(str(tmp_path / 'out'), {}), '')
  assert f'{tmp_path}/run.json: ' in message


PRUNE = {'event': 'prune', 'stage': 1, 'step': 1, 'params': 900, 'loss': 3.0}
PRUNE |= dict.fromkeys(('layer_importance', 'sparsity', 'kv_groups', 'ffn'), [1, 2])
EVALUATE = {'event': 'evaluate', 'of': 'dense', 'step': 0, 'perplexity': 20.0}
ROWS = [
  PRUNE | {'sparsity': 5},
  PRUNE | {'sparsity': [1]},
  PRUNE | {'ffn': [1, 'x']},
  PRUNE | {'stage': None},
  PRUNE | {'params': 10**400},
  {name: value for name, value in PRUNE.items() if name != 'sparsity'},
  EVALUATE | {'perplexity': [1]},
  EVALUATE | {'of': 5},
  EVALUATE | {'text': {}},
  EVALUATE | {'event': []},
  {'event': 'train', 'stage': 1},
  5,
]


@pytest.mark.parametrize('row', ROWS, ids=range(len(ROWS)))
def test_a_line_of_the_log_that_cannot_be_drawn(tmp_path, row):
  path = tmp_path / 'metrics.jsonl'
  for rows in ([PRUNE, EVALUATE], [PRUNE, EVALUATE, row]):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    if row not in rows:
      assert MetricsLog(path).read()[0] == PRUNE
  assert f'{path}: line 3 is damaged: repair it' in refused(lambda: MetricsLog(path).read())


def damaged_tokenizer(path, name, change):
  """A model whose tokenizer's file `name` has been changed."""
  tokenizer = tiny_tokenizer()
  config = tiny_config('llama', UNIFORM, vocab_size=len(tokenizer))
  write_hf(config, random_params(config), path, tokenizer=tokenizer)
  fields = json.loads((path / name).read_text())
  change(fields)
  (path / name).write_text(json.dumps(fields))
  return open_source(str(path))


def test_a_tokenizer_that_fails_only_when_it_is_used(tmp_path):
  def change(fields):
    fields['model_max_length'] = 'long'

  source = damaged_tokenizer(tmp_path / 'model', 'tokenizer_config.json', change)
  assert 'the tokenizer cannot be loaded' in refused(source.load_tokenizer)


def test_a_tokenizer_that_adds_an_id_without_a_row(tmp_path):
  def change(fields):
    fields['post_processor']['processors'][1]['special_tokens']['<s>']['ids'] = [99_999]

  source = damaged_tokenizer(tmp_path / 'model', 'tokenizer.json', change)
  assert 'ids up to 99999' in refused(source.load_tokenizer)


def test_an_added_token_beyond_the_embedding_is_refused_only_in_a_text(tmp_path):
  """Gemma 3's text checkpoints have one, for images."""

  def change(fields):
    token = {'id': 99_999, 'content': '<image>', 'special': True}
    fields['added_tokens'].append({**fields['added_tokens'][0], **token})

  source = damaged_tokenizer(tmp_path / 'model', 'tokenizer.json', change)
  tokenizer = source.load_tokenizer()
  assert tokenizer('<image>')['input_ids'][-1] >= source.config.vocab_size
  check_prompts(source.config, [tokenizer('the')['input_ids']], 1)
  message = refused(check_prompts, source.config, [tokenizer('a <image>')['input_ids']], 1)
  assert 'prompt 1 has the token id' in message and 'leave that token out' in message


class Rows:
  """A train set of three rows."""

  def rows(self, step):
    return np.arange(3)

  def read(self, rows):
    return (np.zeros((len(rows), 8), np.int32),) * 3


def damage_done(path):
  (path / 'done').write_text('3x')


def damage_shape(path):
  np.save(path / 'ids.npy', np.zeros((3, 8, 5), np.uint16))


def damage_by_removal(path):
  (path / 'check.npy').unlink()


@pytest.mark.parametrize('damage', [damage_done, damage_shape, damage_by_removal])
def test_damaged_predictions_of_the_teacher(tmp_path, damage):
  (tmp_path / 'done').write_text('3')
  for name, shape, dtype in (('ids', (3, 8, 4), 'u2'), ('log_p', (3, 8, 5), 'f2'), ('check', (3,), 'u4')):
    np.save(tmp_path / f'{name}.npy', np.zeros(shape, dtype))
  train = TrainOptions(length=8, distill=DistillOptions(cache=4))

  def read():
    return open_taught(tmp_path, Rows(), train, 1, None, dtype=np.float32, compiler=Compiler())

  assert read().rows(0).tolist() == [0, 1, 2]
  damage(tmp_path)
  message = refused(read)
  assert str(tmp_path) in message and 'the teacher is asked again' in message


def test_a_token_cache_with_a_link_to_itself(tmp_path):
  (tmp_path / 'text.txt').write_text('the quick brown fox ' * 50)
  fields = {'text_field': 'text', 'messages_field': 'messages', 'field': 'train.source'}

  def read():
    return open_cache(tmp_path / 'c', str(tmp_path / 'text.txt'), tiny_tokenizer(), Need(50), **fields)

  assert len(read().tokens) >= 50
  (path,) = (tmp_path / 'c').glob('*/ends')
  path.unlink()
  path.symlink_to('ends')
  assert 'data.cache: ' in refused(read)


@pytest.mark.parametrize('zone', ['+99:99', 'Nowhere/Town'])
def test_a_column_of_times_in_a_zone_that_does_not_exist(tmp_path, zone):
  table = pyarrow.table({'text': pyarrow.array([0], pyarrow.timestamp('us', tz=zone))})
  parquet.write_table(table, tmp_path / 'a.parquet')
  fields = {'text_field': 'text', 'messages_field': 'messages'}
  message = refused(lambda: check_source((str(tmp_path / 'a.parquet'),), 'train.source', **fields))
  assert 'a.parquet: not a readable Parquet file' in message
