"""Exported .gguf files in the real llama.cpp, and read back by ourselves."""

import dataclasses
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

import adapt_jax as aj
from adapt_jax.export import gguf as export
from adapt_jax.export.gguf import KINDS, check_gguf, write_gguf
from adapt_jax.export.padded import widest_config
from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, RopeConfig
from adapt_jax.models.formats.gguf_architectures import ARCHITECTURES
from adapt_jax.models.formats.gguf_header import open_file
from adapt_jax.models.formats.hf_weights import leaves
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import layers, llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from tests.support.helpers import UNIFORM, VARIED, logits, random_params, random_tokens, refused, tiny_config
from tests.support.llama_cpp import Job, ask, needs_llama_cpp
from tests.support.tokenizers_for_tests import tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
TEXTS = ["<|im_start|>It's the quick brown fox, 2024!<|im_end|>\n", '  two  spaces\n\n\n', 'déjà vu: 你好 🙂']
GENERATED = 8
SQUARE = (LayerShape(4, 2, 40),) * 2  # heads · head_dim = hidden_size
BY_HEAD = (LayerShape(4, 1, 24), LayerShape(1, 1, 40), LayerShape(3, 1, 24))  # pruned by query heads
SCALED = RopeConfig(50000.0, Llama3Scaling(8.0, 1.0, 4.0, 32))
LINEAR = RopeConfig(50000.0, LinearScaling(8.0))


def config_of(family, shapes=None, **fields):
  shapes = {} if shapes is None else {'layers': shapes}
  return tiny_config(family, vocab_size=330, **shapes, **fields)


def gemma3(shapes, **fields):
  """Every sixth layer sees all tokens: llama.cpp's code says so, not the file."""
  kinds = [dataclasses.replace(shape, window=5 * (i % 6 > 0)) for i, shape in enumerate(shapes, 1)]
  return config_of('gemma3_text', **{'attention_scale': 12**-0.5} | fields).with_layers(kinds)


def gemma2(shapes, **fields):
  return config_of('gemma2', shapes, **{'attention_scale': 12**-0.5, 'tie_embeddings': True} | fields)


def smollm3(shapes, **fields):
  kinds = [dataclasses.replace(shape, rotary=i % 4 > 0) for i, shape in enumerate(shapes, 1)]
  return config_of('smollm3', **fields).with_layers(kinds)


GEMMA = ('gemma2', 'gemma3_text')
GEMMA3 = gemma3(UNIFORM[:1] * 7)
OLMO2 = {'head_dim': 8, 'tie_embeddings': False}
# What each should be for llama.cpp. The tiny tokenizer has 320 tokens: ten rows are unused.
MODELS = {
  'llama': ('deci', config_of('llama')),
  'llama untied, linear': ('deci', config_of('llama', tie_embeddings=False, rope=LINEAR)),
  'llama all biases': ('deci', config_of('llama', qkv_bias=True, output_bias=True)),
  'llama uniform, all biases': ('llama', config_of('llama', UNIFORM, qkv_bias=True, output_bias=True)),
  'llama by query heads': ('deci', config_of('llama', BY_HEAD)),
  'mistral uniform': ('llama', config_of('mistral', UNIFORM)),
  'qwen2 output_bias': ('deci', config_of('qwen2', output_bias=True)),
  'qwen2 uniform, linear': ('qwen2', config_of('qwen2', SQUARE, rope=LINEAR)),
  'qwen2 not square': ('llama', config_of('qwen2', UNIFORM)),
  'qwen2 scaled': ('llama', config_of('qwen2', SQUARE, rope=SCALED)),
  'qwen3 linear': ('qwen3', config_of('qwen3', UNIFORM, rope=LINEAR)),
  'phi3 without window': ('deci', config_of('phi3').with_layers(VARIED)),
  'gemma2 linear': ('gemma2', gemma2(UNIFORM, rope=LINEAR)),
  'gemma3 uniform': ('gemma3', GEMMA3),
  'gemma3 untied, linear': ('gemma3', gemma3(UNIFORM[:1] * 7, tie_embeddings=False, rope=LINEAR)),
  'olmo2 linear': ('olmo2', config_of('olmo2', (LayerShape(6, 2, 40),) * 2, **OLMO2, rope=LINEAR)),
  'smollm3 linear': ('smollm3', smollm3(UNIFORM[:1] * 5, rope=LINEAR)),
  'granite linear, all biases': (
    'granite', config_of('granite', UNIFORM, rope=LINEAR, qkv_bias=True, output_bias=True)
  ),
  'granite tied': ('granite', config_of('granite', UNIFORM, tie_embeddings=True, attention_scale=0.0)),
}  # fmt: skip
# Rows of 64 and 96 are whole blocks, those of 40 are not.
BLOCKS = config_of('llama', (LayerShape(2, 1, 40), LayerShape(4, 2, 96)), hidden_size=64, head_dim=16)

# Models whose layers differ, in the architecture of their family: padded with zeros.
PADDED = {
  'llama padded': config_of('llama'),
  'qwen3 by query heads padded': config_of('qwen3', BY_HEAD),
  'gemma2 padded': gemma2(VARIED),
  'granite padded': config_of('granite'),
  'olmo2 padded': config_of('olmo2', tuple(LayerShape(6, 2, ffn) for ffn in (24, 40)), **OLMO2),
}
CONFIGS = {name: config for name, (_, config) in MODELS.items()} | PADDED


def write(path, config, params, kind='F32', **options):
  write_gguf(config, params, path, tokenizer=tiny_tokenizer(), kind=kind, name='tiny', **options)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  root = tmp_path_factory.mktemp('gguf')
  for name, (_, config) in MODELS.items():
    write(root / f'{name}.gguf', config, random_params(config))
  for kind in KINDS:
    write(root / f'{kind}.gguf', BLOCKS, random_params(BLOCKS), kind)
  for name, config in PADDED.items():
    model = aj.Model(config, random_params(config), tiny_tokenizer())
    aj.save(model, root / name, formats=('gguf_padded',))
    (root / name / 'gguf_padded/model-F32.gguf').rename(root / f'{name}.gguf')
  return root


@pytest.fixture(scope='module')
def answers(files):
  """llama.cpp's word on all the files."""
  jobs = {
    name: Job(files / f'{name}.gguf', TEXTS, random_tokens(config), GENERATED)
    for name, config in CONFIGS.items()
  }
  return ask(jobs | {kind: Job(files / f'{kind}.gguf', [], random_tokens(BLOCKS)) for kind in KINDS})


def divergence(expected, found):
  """Kullback-Leibler, nats a token: less noisy than the perplexity of so little text."""
  p, q = (np.float64(jax.nn.log_softmax(np.asarray(x, np.float32))) for x in (expected, found))
  return (np.exp(p) * (p - q)).sum(-1).mean()


def half_gelu(x):
  """GELU as llama.cpp has it on a CPU: a table of half precision between -10 and 10."""
  half = jnp.float16
  table = jax.nn.gelu(x.astype(half).astype(x.dtype), approximate=True).astype(half).astype(x.dtype)
  return jnp.where(x <= -10, 0, jnp.where(x >= 10, x, table))


def ours(config, params, tokens, generate):
  """Our own logits, and each row's greedy continuation; one length throughout, for one compile."""
  length = tokens.shape[1]
  rows = np.pad(tokens, ((0, 0), (0, generate)))  # what comes later does not count
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(layers._ACTIVATIONS, 'gelu_tanh', half_gelu)
    logits = jax.jit(llama.apply, static_argnums=0)
    found = np.asarray(logits(config, params, rows))[:, :length]
    for at in range(length, length + generate):
      rows[:, at] = np.asarray(logits(config, params, rows))[:, at - 1].argmax(-1)
  return found, rows[:, length:].tolist()


@needs_llama_cpp
@pytest.mark.parametrize('name', CONFIGS)
def test_llama_cpp_computes_the_same(name, answers):
  """Padded layers also of families for which llama.cpp has no architecture with layers that differ."""
  config, answer = CONFIGS[name], answers[name]
  expected, continuation = ours(config, random_params(config), random_tokens(config), GENERATED)
  # GELU's table: where a sum is rounded otherwise, its nearest entry may be another one.
  limit = 2e-3 if config.family in GEMMA else 1e-4
  np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=limit)
  assert np.median(np.abs(answer.logits - expected)) < 2e-5
  assert answer.greedy == continuation
  assert answer.ids == [tiny_tokenizer()(text).input_ids for text in TEXTS]


@pytest.mark.parametrize('name', PADDED)
def test_padded_layers_are_of_the_familys_own_architecture(name, files):
  source = open_source(str(files / f'{name}.gguf'))
  assert open_file(source.path).metadata['general.architecture'] != 'deci'
  assert source.config == widest_config(PADDED[name]) and source.config.uniform


# The mean difference in standard deviations of the logits: on a CPU, llama.cpp multiplies by F16 and BF16
# matrices what it has rounded to the same, and by quantised ones what it has rounded to eight bits.
@needs_llama_cpp
@pytest.mark.parametrize('kind, mean', list(zip(KINDS, (1e-5, 0.003, 0.03, 0.06, 0.06), strict=True)))
def test_llama_cpp_computes_every_kind(kind, mean, files, answers):
  source = open_source(str(files / f'{kind}.gguf'))
  expected = np.asarray(logits(source.config, source.load_params(), random_tokens(BLOCKS)))
  assert np.abs(answers[kind].logits - expected).mean() < mean * expected.std()


@pytest.mark.parametrize('name', MODELS)
def test_our_own_loader_reads_back_the_same(name, files):
  arch, config = MODELS[name]
  path = files / f'{name}.gguf'
  metadata = open_file(path).metadata
  assert metadata['general.architecture'] == arch and metadata['general.name'] == 'tiny'
  source, params = open_source(str(path)), random_params(config)
  assert source.config == config and source.dtype == 'float32'
  assert source.load_tokenizer()(TEXTS).input_ids == tiny_tokenizer()(TEXTS).input_ids
  assert source.load_tokenizer().chat_template == tiny_tokenizer().chat_template

  def same(path, found, given):
    if 'norm' in jax.tree_util.keystr(path):  # the file has the sum of Gemma's, rounded to float32
      given = given + np.float32(config.norm_offset) - np.float32(config.norm_offset)
    np.testing.assert_array_equal(found, given)

  jax.tree_util.tree_map_with_path(same, source.load_params(), params)


@pytest.mark.parametrize('kind, dtype', [*((kind, 'float32') for kind in KINDS), ('Q4_0', 'bfloat16')])
def test_every_kind_reads_back_as_it_is_rounded(kind, dtype, tmp_path):
  """Vectors are F32, rows that are no whole blocks F16, and what makes the logits has eight bits at least."""
  path, params = tmp_path / 'tiny.gguf', random_params(BLOCKS, dtype=dtype)
  write(path, BLOCKS, params, kind)
  source = open_source(str(path))
  loaded = source.load_params()
  for leaf in leaves(BLOCKS):
    ours, theirs = params, loaded
    for key in leaf.path:
      ours, theirs = ours[key], theirs[key]
    stored = kind if len(leaf.hf_shape) == 2 else 'F32'
    if stored in ('Q8_0', 'Q4_0') and leaf.hf_shape[1] == 40:
      stored = 'F16'
    elif stored == 'Q4_0' and leaf.name == 'model.embed_tokens.weight':
      stored = 'Q8_0'
    expected, wanted = ours.reshape(leaf.hf_shape).astype(np.float32), GGMLQuantizationType[stored]
    expected = dequantize(quantize(expected, wanted), wanted)
    assert source.reader.dtype(leaf.name) == {'F16': 'float16', 'BF16': 'bfloat16'}.get(stored, 'float32')
    np.testing.assert_array_equal(
      np.asarray(theirs, np.float32).reshape(leaf.hf_shape), expected, err_msg=leaf.name
    )


def written_with(monkeypatch, path, config, fields):
  """Writes a model with more fields of its architecture."""
  add = GGUFWriter.add_block_count

  def add_more(writer, count):
    add(writer, count)
    for key, value in fields.items():
      (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f'{writer.arch}.{key}', value)

  monkeypatch.setattr(GGUFWriter, 'add_block_count', add_more)
  write(path, config, random_params(config))
  return str(path)


@pytest.mark.parametrize(
  'key, value',
  [
    ('attention.sliding_window_pattern', 3),
    ('rope.freq_base_swa', 2e4),
    ('final_logit_softcapping', 30.0),
  ],
)
def test_fields_that_would_change_what_gemma_3_computes_are_refused(key, value, tmp_path, monkeypatch):
  path = written_with(monkeypatch, tmp_path / 'tiny.gguf', GEMMA3, {key: value})
  assert f'gemma3.{key} = {value}' in refused(open_source, path)


def test_fields_that_only_say_the_usual_are_read(tmp_path, monkeypatch):
  usual = {'rope.scaling.factor': 1.0, 'attention.sliding_window_pattern': 6, 'rope.freq_base_swa': 1e4}
  path = written_with(monkeypatch, tmp_path / 'tiny.gguf', GEMMA3, usual)
  assert open_source(path).config == GEMMA3


def test_a_gemma_2_without_a_window_has_that_of_llama_cpp(tmp_path, monkeypatch):
  """As early converters wrote it; a base frequency of windows that is that of all layers changes nothing."""
  config = gemma2(UNIFORM)
  monkeypatch.setattr(GGUFWriter, 'add_sliding_window', lambda writer, _: None)
  path = written_with(monkeypatch, tmp_path / 'x.gguf', config, {'rope.freq_base_swa': config.rope.theta})
  assert [shape.window for shape in open_source(path).config.layers] == [4096, 0]


@pytest.mark.parametrize(
  'config, word',
  [
    (tiny_config('qwen3'), 'differ by layer'),
    (tiny_config('qwen3', UNIFORM, output_bias=True), 'biases'),
    (tiny_config('qwen3', UNIFORM, rope=SCALED), 'scaling'),
    (tiny_config('llama', hidden_size=30, sliced_from=48), 'SliceGPT'),
    (tiny_config('phi3', UNIFORM), 'sliding windows'),
    (tiny_config('gemma3_text', UNIFORM[:1] * 7), 'windows or rotary embeddings in other layers'),
    (gemma3(UNIFORM, attention_scale=0.1), 'attention_scale = 0.1'),
    (gemma3(UNIFORM, logit_cap=9.0), 'logit_cap = 9.0'),
    (config_of('gemma3_text').with_layers(UNIFORM), 'no sliding window'),
    (gemma3(UNIFORM, local_rope=RopeConfig(2e4)), 'local_rope = '),
    (gemma2(UNIFORM, tie_embeddings=False), 'a head of its own'),
    (gemma2(UNIFORM, logit_cap=0.0), 'logits without caps'),
    (config_of('olmo2', UNIFORM, **OLMO2 | {'head_dim': 12}), 'heads that do not add up'),
    (config_of('olmo2', UNIFORM, **OLMO2 | {'tie_embeddings': True}), 'tied embeddings'),
    (tiny_config('smollm3', UNIFORM), 'windows or rotary embeddings in other layers'),
  ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config, word, tmp_path):
  assert word in (message := refused(check_gguf, config)) and config.family in message
  assert refused(write, tmp_path / 'tiny.gguf', config, None) == message
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('arch, depth', [('gemma2', 46), ('gemma3', 62)])
def test_the_largest_gemmas_scale_attention_by_their_width(arch, depth):
  """Gemma 2 and 3 27B: 4608 / 32 and 5376 / 32, not the head size of 128."""
  family, width = ('gemma2', 4608) if arch == 'gemma2' else ('gemma3_text', 5376)
  shapes = {'hidden_size': width, 'head_dim': 128}
  for count, size in ((depth, width // 32), (depth - 1, 128)):
    config = tiny_config(family, (LayerShape(32, 16, 64),) * count, **shapes)
    assert ARCHITECTURES[arch].implied(config, 5).attention_scale == size**-0.5


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
  """As numpy sees it: parameters on a device are copied to the host one by one."""
  config = tiny_config('llama', (LayerShape(3, 1, 2048),) * 4, vocab_size=320, hidden_size=128)
  params = jax.tree.map(jax.numpy.asarray, random_params(config))
  largest = 4 * 2048 * 128
  tracemalloc.start()
  try:
    write(tmp_path / 'tiny.gguf', config, params, 'Q8_0')
    assert tracemalloc.get_traced_memory()[1] < 3 * largest  # of 12 such tensors
  finally:
    tracemalloc.stop()


def test_other_processes_only_take_part_in_gathering(tmp_path, monkeypatch):
  config, gathered = tiny_config(vocab_size=320), []

  def host_tensors(config, params):
    for leaf in leaves(config):
      gathered.append(leaf.name)
      yield leaf, None

  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(export, 'host_tensors', host_tensors)
  write(tmp_path / 'tiny.gguf', config, random_params(config))
  assert gathered == [leaf.name for leaf in leaves(config)] and not list(tmp_path.iterdir())


@needs_llama_cpp
@pytest.mark.parity
@pytest.mark.skipif(not DEMO.exists(), reason='the demo model is not there: make fetch')
def test_pruned_smollm2_in_llama_cpp(tmp_path):
  source = open_source(str(DEMO))
  tokenizer, plan = source.load_tokenizer(), PrunePlan.dense(source.config)
  for layer in (4, 9, 17):
    plan.kv[layer][0] = False
  for layer in range(0, 30, 3):
    plan.ffn[layer][1024 + 16 * layer :] = False
  config = plan.pruned_config(source.config)
  params = surgery.compact(source.load_params(), plan)
  text = (ROOT / 'LICENSE').read_text()
  rows = np.array(tokenizer(text).input_ids[:128]).reshape(2, 64)
  jobs = {}
  for kind in ('F32', 'Q8_0', 'Q4_0'):
    jobs[kind] = Job(tmp_path / f'{kind}.gguf', [text], rows, 8 if kind == 'F32' else 0)
    write_gguf(config, params, jobs[kind].path, tokenizer=tokenizer, kind=kind, name='SmolLM2')
  answers = ask(jobs)
  assert all(answer.ids == [tokenizer(text).input_ids] for answer in answers.values())
  expected, continuation = ours(config, params, rows, jobs['F32'].generate)
  assert answers['F32'].greedy == continuation
  assert divergence(expected, answers['F32'].logits) < 1e-4
  assert divergence(expected, answers['Q8_0'].logits) < 0.03
  for kind in ('Q8_0', 'Q4_0'):  # the weights as stored: llama.cpp rounds activations too
    stored, _ = ours(config, open_source(str(jobs[kind].path)).load_params(), rows, 0)
    assert divergence(stored, answers[kind].logits) < 0.02
