"""Texts from the cache: the tokens of single prompts and of transformers, few compiles, mode generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from adapt_jax.config.build import from_dict
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.export.hf import write_hf
from adapt_jax.generation.generator import Generator, bucket
from adapt_jax.generation.sampling import Sampling, stop_ids
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import generate
from tests.formats.test_export_hf import EXPORTS, load
from tests.programs.test_sharding import SHAPES, make_model, put, set_mesh
from tests.support import runs
from tests.support.helpers import VARIED, KeepingCompiler, random_params, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.usefixtures('code_cache')
SMALL = tiny_config('mistral', VARIED[:2])
SAMPLED = Sampling(1.0, top_k=40, top_p=0.95)


def make_generator(config, params=None, max_batch=8):
  params = random_params(config) if params is None else params
  params = jax.tree.map(jnp.asarray, params)
  return Generator(
    config, params, compiler=KeepingCompiler(), dtype=jnp.dtype('float32'), max_batch=max_batch
  )


def make_prompts(*lengths, ids=64, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, ids, length).tolist() for length in lengths]


@functools.cache
def shared():
  """A generator for tests that do not count compiles."""
  return make_generator(SMALL)


@pytest.mark.parametrize('name', ['llama-all-biases', 'qwen2', 'qwen3'])
def test_greedy_tokens_are_those_of_transformers_whatever_else_is_in_the_batch(name, tmp_path):
  config = EXPORTS[name]
  params = random_params(config)
  write_hf(config, params, tmp_path / 'hf')
  model = load(tmp_path / 'hf')
  prompts = make_prompts(7, 1, 16, ids=320)

  def theirs(prompt):
    ids = torch.tensor([prompt])
    options = {'max_new_tokens': 12, 'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

  assert make_generator(config, params).generate(prompts, 12) == [theirs(prompt) for prompt in prompts]


def test_one_prefill_and_one_decode_a_batch_size_and_bucket():
  generator = make_generator(SMALL, max_batch=4)
  counts = generator._compiler.counts
  generator.generate(make_prompts(1, 9, 16), 10)
  assert counts == {'prefill': 1, 'decode': 1}
  generator.generate(make_prompts(3, 3, 3, 3, 3, 3), 16, SAMPLED, frozenset({1, 2}), seed=3)
  assert counts == {'prefill': 1, 'decode': 1}
  generator.generate(make_prompts(17, 3, 3, 3), 10)
  assert counts == {'prefill': 2, 'decode': 2}
  assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 512)] == [16, 16, 24, 24, 32, 48, 64, 96, 512]


def test_seed_and_place_decide_what_is_drawn_not_the_other_prompts():
  a, b, c = make_prompts(6, 9, 4)
  first = shared().generate([a, b], 12, SAMPLED, seed=5)
  assert shared().generate([c, b], 12, SAMPLED, seed=5)[1] == first[1]
  assert shared().generate([a, b], 12, SAMPLED, seed=6) != first
  same = shared().generate([a, a], 12, SAMPLED, seed=5)
  assert same[0] == first[0] and same[1] != same[0]
  greedy = shared().generate([a, b], 12)
  assert first != greedy == shared().generate([a, b], 12, Sampling(2.0, top_k=1), seed=5)


def test_stop_ids_end_a_row_and_all_ended_rows_end_the_loop():
  generator = shared()
  prompts = make_prompts(6, 9)
  whole = generator.generate(prompts, 14)
  stop = whole[0][3]

  def cut(new):
    return new[: new.index(stop)] if stop in new else new

  before = generator.timings.decode_tokens
  assert generator.generate(prompts, 14, stop_ids=frozenset({stop, 10**6})) == [cut(new) for new in whole]
  # A row's first token is the prefill's; its stop id is made as any other.
  assert generator.timings.decode_tokens - before == sum(min(len(cut(new)), 13) for new in whole)
  assert generator.generate(prompts[:1], 14, stop_ids=frozenset({whole[0][0]})) == [[]]
  assert generator.timings.prefill_rate > 0 and generator.timings.decode_rate > 0


def test_the_cache_is_written_in_place():
  """One row and one KV head are where XLA copies first: the loop holds little beside it."""
  config = tiny_config('mistral', max_position=2048)
  generator = make_generator(config)
  generator.generate(make_prompts(1000), 2)
  memory = generator._compiler.made['decode'].memory_analysis()
  cache = sum(2 * shape.num_kv_heads * (1024 + 16) * 12 * 4 for shape in config.layers)
  assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < cache / 4  # scores
  assert cache < generator.planned_bytes()


def test_bfloat16_weights_are_read_as_they_are():
  """No program of one row holds them in fp32 beside."""
  config = tiny_config('mistral', hidden_size=256, vocab_size=1024)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(config))
  generator = Generator(config, params, compiler=KeepingCompiler(), dtype=jnp.dtype('bfloat16'), max_batch=1)
  generator.generate(make_prompts(16), 16)
  for program in generator._compiler.made.values():
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 2


@functools.cache
def tokens_on_one_device():
  generator, prompts = make_generator(*make_model(layers=SHAPES[:2])), make_prompts(5, 12, 3, 9, 2, ids=50)
  return generator.generate(prompts, 8), generator.generate(prompts, 8, SAMPLED)


@pytest.mark.parametrize('mesh', [(1, 4, 1), (2, 1, 2)])
def test_tokens_on_a_mesh_are_those_of_one_device(mesh):
  config, params, prompts = *make_model(layers=SHAPES[:2]), make_prompts(5, 12, 3, 9, 2, ids=50)
  greedy, drawn = tokens_on_one_device()
  with set_mesh(*mesh):
    generator = make_generator(config, put(params))
    assert generator.generate(prompts, 8) == greedy
    assert generator.generate(prompts, 8, SAMPLED) == drawn
  spec = generator._compiler.made['decode'].output_shardings['cache'][0]['k_cache'].spec
  assert spec == PartitionSpec(('data', 'fsdp'), 'tensor', None, None)


# -- the mode ---------------------------------------------------------------------------------------------


def make_options(files, **fields):
  config = runs.make_config(files)
  config.generate.update({'max_new_tokens': 6} | fields)
  return from_dict(config.to_dict())


def test_texts_are_printed_with_their_prompts_and_the_speed(files, capsys):
  generate.run(make_options(files), ['the union', 'of need'])
  lines = capsys.readouterr().out.splitlines()
  (speed,) = [line for line in lines if 'prefill' in line]
  assert 'rendered with the chat template' in lines[0] and ' 0.0 tokens/s' not in speed
  assert lines.index('== the union') < lines.index('== of need') < len(lines) - 1


def test_a_prompt_is_a_chat_or_plain_text_and_ends_at_the_models_eos(files):
  tokenizer = tiny_tokenizer()
  ids = {chat: encode_prompts(['the dog'], tokenizer, chat)[0] for chat in (True, False)}
  assert tokenizer.decode(ids[True]) == '<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n'
  assert ids[False] == tokenizer('the dog').input_ids and ids[False][0] == tokenizer.bos_token_id
  source = open_source(str(files / 'model'))
  assert stop_ids(source.generation, tokenizer) == {tokenizer.eos_token_id}
  source.generation['eos_token_id'] = [1, 3]
  assert stop_ids(source.generation, tokenizer) == {1, 3}
  del source.generation['eos_token_id']
  assert stop_ids(source.generation, tokenizer) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
  'prompts,fields,words',
  [
    (['a', ''], {}, '--prompt is empty'),
    (['a', 'the dog ' * 1200], {}, 'prompt 2 has .* tokens, .* 6 new ones .* 2,048'),
  ],
)
def test_bad_input_is_refused_before_weights_are_read(files, monkeypatch, prompts, fields, words):
  monkeypatch.setattr(generate, 'load_source', None)
  with pytest.raises(InputError, match=words):
    generate.run(make_options(files, **fields), prompts)


def test_an_empty_prompt_of_ids_is_refused():
  with pytest.raises(InputError, match='prompt 2 has 0 tokens'):
    shared().generate([[1], []], 4)
  assert shared().generate([], 4) == []
