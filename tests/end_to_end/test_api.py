"""The library: the whole job in memory, the same as the command's, and nothing left behind in the process."""

import dataclasses
import functools
import json
import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.generation import self_text
from adapt_jax.models.formats.source import open_source
from adapt_jax.pruning.criteria import Importance
from adapt_jax.pruning.methods.base import UniformOneShot
from adapt_jax.pruning.pruner import Pruner
from tests.support import runs
from tests.support.helpers import logits, refused


@pytest.fixture(scope='module')
def model(files):
  return aj.load(files / 'model')


@pytest.fixture(scope='module')
def rows(files, model):
  return aj.rows(model, files / 'train.txt', samples=16, length=16, own=0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp() / 'user-cache'))


def test_prune_gives_the_weights_that_the_command_writes(files, model, rows, tmp_path):
  config = runs.make_config(files)
  config.prune.method, config.prune.heal = 'obs', 2
  runs.in_process(config, tmp_path / 'out', 'prune')
  small, plan = aj.prune(model, rows, target=0.8, heal=2, align_ffn=1)
  written = open_source(str(tmp_path / 'out/hf'))
  assert small.config == written.config
  chex.assert_trees_all_equal(jax.device_get(small.params), jax.device_get(written.load_params(None)))
  assert plan.params(model.config) == small.num_params <= 0.8 * model.num_params


def test_several_targets_share_the_scoring_pass_and_are_what_each_gives(model, rows, monkeypatch):
  scored, compute = [], Pruner._compute
  monkeypatch.setattr(Pruner, '_compute', lambda self, *args: scored.append(1) or compute(self, *args))
  found = aj.prune(model, rows, target=[0.9, '0.7kv'], heal=1, align_ffn=1)
  assert len(scored) == 1 and len(found) == 2
  small, plan = found[1]
  alone, same = aj.prune(model, rows, target='0.7kv', heal=1, align_ffn=1)
  assert plan.equals(same) and small.config == alone.config
  chex.assert_trees_all_equal(small.params, alone.params)


def test_healing_brings_the_model_nearer_to_the_dense_one(model, rows):
  """On the rows alone; the weights that it starts from stay."""
  dense = jax.nn.log_softmax(logits(model.config, model.params, rows))

  def divergence(heal):
    small, _ = aj.prune(model, rows, target=0.7, heal=heal)
    pruned = jax.nn.log_softmax(logits(small.config, small.params, rows))
    return float(jnp.sum(jnp.exp(dense) * (dense - pruned), axis=-1).mean())

  assert divergence(300) < 0.8 * divergence(0)


def test_the_model_generates_the_rows_that_the_command_would_calibrate_on(files, model, tmp_path):
  found = aj.rows(model, 'self', samples=6, length=24, seed=3)
  source = open_source(str(files / 'model'))
  asked = {'seed': [3, self_text.CALIBRATION], 'dtype': jnp.float32, 'directory': tmp_path}
  path = self_text.draw(source, source.load_tokenizer(), 6, 24, **asked)
  np.testing.assert_array_equal(found, np.load(path))


def test_the_whole_job_in_memory(files, model, rows, tmp_path, capfd):
  before, hook = jax.tree.map(np.array, model.params), sys.unraisablehook
  compiled = jax.jit(lambda x: x + 1)
  compiled(jnp.ones(3))
  small, plan = aj.prune(model, rows, target=0.7, align_ffn=1)
  pruned = aj.perplexity(small, files / 'valid.txt', length=32)
  options = {'length': 32, 'batch': 4, 'lr': 1e-2, 'min_lr': 1e-3}
  better = aj.recover(small, str(files / 'train.txt'), tokens=runs.TOKENS, teacher=model, **options)
  recovered = aj.perplexity(better, files / 'valid.txt', length=32)
  assert recovered < pruned
  assert plan.kv_widths.tolist() == [shape.num_kv_heads for shape in small.config.layers]
  assert plan.ffn_widths.tolist() == [shape.ffn for shape in small.config.layers]
  assert set(aj.save(better, tmp_path / 'out', formats='gguf')) == {'gguf/model-F32.gguf'}
  found = aj.save(better, tmp_path / 'out', formats=('hf', 'gguf'))
  assert set(found) == {'hf', 'gguf/model-F32.gguf'}
  assert 'pruned to 6' in (tmp_path / 'out/hf/README.md').read_text()
  again = aj.load(tmp_path / 'out')  # what save has written, of which it knows the origin
  assert again.config == better.config and 'parameters' in repr(again)
  assert again.dense == model.num_params and model.name.endswith(f'/{again.name}')
  texts = aj.generate(again, ['the union', 'the law'], max_new_tokens=4)
  assert len(texts) == 2 and aj.generate(again, 'the union', max_new_tokens=4) == texts[0]
  twice, _ = aj.prune(better, rows, target=0.8, heal=0, align_ffn=1)
  assert twice.num_params <= 0.8 * better.num_params and twice.dense == model.num_params
  after = jax.tree.map(np.array, model.params)
  chex.assert_trees_all_equal(before, after)  # nothing donated, nothing changed
  assert compiled._cache_size() == 1  # the caller's programs are still there
  assert sys.unraisablehook is hook and capfd.readouterr() == ('', '')


class First(UniformOneShot):
  """Keeps what lies in front."""

  importance = Importance(lambda w, g, f: w, gradient=False)
  distance = 'cosine'


def test_methods_and_importances_come_from_outside(model, rows):
  small, plan = aj.prune(
    model, rows, target=0.8, method=First, serve='tensor_parallel=3', heal=0, align_ffn=1
  )
  assert small.num_params <= 0.8 * model.num_params
  assert not any(plan.ffn_widths % 3) and not any(plan.kv_widths % 3)
  large = Importance(lambda w, g, f: -w * w, gradient=False)
  by_name, _ = aj.prune(model, rows, target=0.8, method='uniform', importance='l2', heal=0, align_ffn=1)
  mine, plan = aj.prune(model, rows, target=0.8, method='uniform', importance=large, heal=0, align_ffn=1)
  chex.assert_trees_all_equal(by_name.params, mine.params)  # of the score only the size counts
  assert min(plan.ffn_widths) < 48


def test_chats_in_fields_of_another_name(files, tmp_path):
  text = (files / 'train.txt').read_text()
  pieces = [text[i : i + 400] for i in range(0, 16_000, 400)]
  turns = [[{'role': 'user', 'content': x[:200]}, {'role': 'assistant', 'content': x[200:]}] for x in pieces]
  (tmp_path / 'chats.jsonl').write_text('\n'.join(json.dumps({'talk': x}) for x in turns))
  model = aj.load(files / 'model', chat_template='plain')
  named = {'messages_field': 'talk', 'length': 32}
  before = aj.perplexity(model, tmp_path / 'chats.jsonl', **named)
  better = aj.recover(model, str(tmp_path / 'chats.jsonl'), tokens=2560, batch=4, lr=1e-2, **named)
  assert aj.perplexity(better, tmp_path / 'chats.jsonl', **named) < before


def test_token_ids_stand_for_a_text(model, rows):
  assert aj.rows(model, rows, samples=4).shape == (4, 16)
  value = aj.perplexity(model, rows)
  assert value == pytest.approx(aj.perplexity(model, jnp.asarray(rows)))
  better = aj.recover(model, rows, tokens=4 * 16 * 4, batch=4, lr=1e-2)
  assert aj.perplexity(better, rows) < value


def test_a_teacher_that_nothing_is_learned_from_is_not_run(model, rows):
  broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
  options = {'tokens': 2 * 4 * 16, 'batch': 4, 'micro_batch': 4, 'lr': 1e-3}
  found = aj.recover(model, rows, teacher=broken, distill={'alpha': 0.0}, **options)
  chex.assert_trees_all_equal(found.params, aj.recover(model, rows, **options).params)


def test_training_in_bfloat16_keeps_fp32_weights(model, rows):
  options = {'tokens': 4 * 16, 'batch': 4, 'micro_batch': 4, 'lr': 1e-3}
  found, plain = (aj.recover(model, rows, dtype=dtype, **options) for dtype in ('bfloat16', 'float32'))
  chex.assert_trees_all_equal_dtypes(found.params, plain.params)
  assert not np.array_equal(found.params['embed'], plain.params['embed'])


def test_it_runs_on_the_callers_mesh(model, rows):
  automatic = (jax.sharding.AxisType.Auto,) * 3
  devices = jax.make_mesh((1, 2, 1), ('data', 'fsdp', 'tensor'), axis_types=automatic)
  alone, plan = aj.prune(model, rows, target=0.8)
  with jax.set_mesh(devices):
    assert 'rows = 15' in refused(aj.prune, model, rows[:15])
    sharded, same = aj.prune(model, rows, target=0.8)
    assert len(sharded.params['embed'].sharding.device_set) == 2
  with jax.set_mesh(jax.make_mesh((1, 2, 1), ('x', 'y', 'z'), axis_types=automatic)):
    assert 'make it by jax.make_mesh((data, fsdp, tensor)' in refused(aj.perplexity, model, rows)
  assert same.equals(plan)
  chex.assert_trees_all_close(jax.device_get(alone.params), jax.device_get(sharded.params), atol=1e-4)


def _with_vocabulary(model, size):
  return dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=size))


@pytest.mark.parametrize(
  ('call', 'named'),
  [
    (lambda m, r: aj.rows(m, 'self', length=10**6), 'length = 1000000'),
    (lambda m, r: aj.rows(dataclasses.replace(m, tokenizer=None), 'text.txt'), 'no tokenizer'),
    (lambda m, r: aj.prune(m, r[0]), 'rows'),
    (lambda m, r: aj.prune(m, r + 10**6), 'rows'),
    (lambda m, r: aj.prune(m, r, targt=0.5), 'prune.targt'),
    (lambda m, r: aj.prune(m, r, stages=3), 'prune.stages'),  # would do nothing
    (lambda m, r: aj.prune(m, r, method='slicegpt'), 'prune.method'),
    (lambda m, r: aj.recover(m, r, tokens=5), 'train.tokens = 5'),
    (lambda m, r: aj.recover(m, r, tokens=64, distill={'cache': 8}), 'train.distill.cache'),
    (lambda m, r: aj.recover(m, r, tokens=64, distill={'source': 'x'}), 'train.distill.source'),
    (lambda m, r: aj.recover(m, r, tokens=64, teacher=_with_vocabulary(m, 7)), 'teacher'),
    (lambda m, r: aj.load(m.name, dtype='int32'), 'int32'),
    (lambda m, r: aj.generate(m, 'a', temperature=-1), 'generate.temperature'),
  ],
)
def test_a_wrong_argument_is_named(model, rows, call, named):
  assert named in refused(call, model, rows)


def executed(blocks, places):
  """The names that blocks of code define one after another, with other texts in the places of some."""
  names: dict[str, object] = {'functools': functools}
  for code in blocks:
    for shown, place in places.items():
      code = code.replace(shown, place)
    exec(code, names)
  return names


def test_the_code_that_the_pages_show_runs(files, tmp_path, monkeypatch):
  """README's and the library page's, one after another, with a tiny model and short texts in their place."""
  monkeypatch.chdir(tmp_path)
  places = {
    'HuggingFaceTB/SmolLM2-135M-Instruct': str(files / 'model'),
    "'calibration.txt')": f'{str(files / "train.txt")!r}, samples=8, length=32)',
    'calibration.txt': str(files / 'train.txt'),
    'corpus.jsonl': str(files / 'train.txt'),
    "'heldout.txt')": f'{str(files / "valid.txt")!r}, length=32)',
    'tokens=2_000_000': 'tokens=256, batch=2, length=32',
    'aj.prune(': 'functools.partial(aj.prune, heal=0)(',
  }
  pages = [(runs.ROOT / page).read_text() for page in ('README.md', 'docs/library.md')]
  blocks = [re.findall(r'^```python\n(.*?)^```', page, re.M | re.S) for page in pages]
  assert all(blocks)
  names = executed(sum(blocks, []), places)
  assert (tmp_path / 'out/gguf').is_dir() and names['logits'].shape[:2] == (2, 32)
  assert names['plan'].ffn_widths[0] == 48  # the last one shown spares the first layers


def test_the_notebook_runs(files, tmp_path, monkeypatch):
  """Every cell, with a tiny model and short texts in the places of the demo's."""
  matplotlib = pytest.importorskip('matplotlib')
  matplotlib.use('agg')
  monkeypatch.chdir(tmp_path)
  for kind in ('sotu', 'encyclopedia'):
    for part in ('train', 'valid'):
      place = tmp_path / 'data' / kind / part
      place.mkdir(parents=True)
      (place / 'text.txt').write_text((files / 'train.txt').read_text())
  places = {
    'data/SmolLM2-135M-Instruct.Q4_1.gguf': str(files / 'model'),
    "os.chdir('..')": 'None',
    'tokens=8_192': 'tokens=256',
    'samples=4, length=256': 'samples=8, length=32',
    "'length': 256": "'length': 32",
    'length=256, max_tokens=2048': 'length=32, max_tokens=256',
  }
  cells = json.loads((runs.ROOT / 'examples/prune_and_recover.ipynb').read_text())['cells']
  names = executed([''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code'], places)
  assert names['measured'].keys() == {'dense', 'pruned', 'recovered'}
  assert names['better'].num_params <= 0.8 * names['model'].num_params and (tmp_path / 'out/gguf').is_dir()
