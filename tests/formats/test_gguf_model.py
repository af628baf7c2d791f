"""GGUF input against files written by the gguf package, and the tokenizers in them."""

import dataclasses
import os
import pathlib
import shutil
import struct

import gguf as gguf_package
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.formats import gguf_model, gguf_tokenizer
from adapt_jax.models.formats.hf_weights import check_tensors, leaves
from adapt_jax.models.formats.source import open_source
from tests.support import helpers, reference
from tests.support.helpers import refused

ROOT = pathlib.Path(__file__).parents[2]
DEMO_NAME = 'SmolLM2-135M-Instruct.Q4_1.gguf'
PLAIN = {
  Type.F32: np.dtype(np.float32),
  Type.F16: np.dtype(np.float16),
  Type.BF16: np.dtype(ml_dtypes.bfloat16),
}
QUANTISED = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)
TEXTS = (
  'hello hello 2024, 1234567 and 3.14!',
  '  two  spaces\t\ttabs\r\n\n\nlines \n end ',
  "It's déjà vu: 你好, мир, ½ ٣ 🙂👩‍👩‍👧 e\u0301",
)


def tiny_config(family: str, **changes) -> ModelConfig:
  fields = {'vocab_size': 40, 'hidden_size': 64, 'rope': RopeConfig(500000.0), 'max_position': 512}
  fields |= {'head_dim': 32 if family == 'qwen3' else 16, 'tie_embeddings': family == 'qwen3'}
  return helpers.tiny_config(family, **{'layers': (LayerShape(4, 2, 96),) * 2} | fields | changes)


def random_weights(config: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {leaf.name: rng.normal(size=leaf.hf_shape).astype(dtype) for leaf in leaves(config)}


def permute(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """What llama.cpp's converter does to q and k of the llama architecture."""
  heads = len(weight) // head_dim
  halves = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def new_writer(path: pathlib.Path, config: ModelConfig, **split) -> gguf_package.GGUFWriter:
  shape = config.layers[0]
  writer = gguf_package.GGUFWriter(path, config.family, **split)
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.hidden_size)
  writer.add_head_count(shape.num_heads)
  writer.add_head_count_kv(shape.num_kv_heads)
  writer.add_feed_forward_length(shape.ffn)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  return writer


def finish(writer: gguf_package.GGUFWriter) -> None:
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def add_weights(writer, config: ModelConfig, weights: dict[str, np.ndarray], kind: Type) -> None:
  arch = {'llama': 'LLAMA', 'qwen2': 'QWEN2', 'qwen3': 'QWEN3'}[config.family]
  gguf_names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH[arch], config.num_layers)
  for name, weight in weights.items():
    if config.family == 'llama' and ('q_proj' in name or 'k_proj' in name):
      weight = permute(weight, config.head_dim)
    stored = Type.F32 if weight.ndim == 1 else kind
    data = weight.astype(np.float32)
    if stored != Type.F32:
      data = gguf_package.quantize(data, stored)
    writer.add_tensor(gguf_names.get_name(name, ('.weight', '.bias')), data, raw_dtype=stored)


def write_model(
  path: pathlib.Path, config: ModelConfig, kind: Type = Type.F32, extra=None, **split
) -> dict[str, np.ndarray]:
  """Writes a random model; `extra` may add to the writer. Returns the weights in Hugging Face's layout."""
  weights = random_weights(config, PLAIN.get(kind, np.float32))
  writer = new_writer(path, config, **split)
  add_weights(writer, config, weights, kind)
  if extra:
    extra(writer)
  finish(writer)
  return weights


def assert_refused(path: pathlib.Path, *words: str) -> None:
  message = refused(open_source, str(path))
  for word in (str(path), *words):
    assert word in message


READ = [('llama', kind) for kind in (*PLAIN, *QUANTISED)] + [('qwen2', Type.F32), ('qwen3', Type.Q8_0)]


@pytest.mark.parametrize('family, kind', READ)
def test_every_type_and_architecture_reads_back(tmp_path, family, kind):
  config, path = tiny_config(family), tmp_path / 'tiny.gguf'
  weights = write_model(path, config, kind)
  assert gguf_model.GgufReader(path).config == config
  reader = gguf_model.GgufReader(path)
  check_tensors(config, reader)
  assert reader.names() == set(weights)
  for name, weight in weights.items():
    # Quantisation works along rows, so it commutes with the permutation of rows.
    expected = weight
    if weight.ndim == 2 and kind in QUANTISED:
      expected = gguf_package.dequantize(gguf_package.quantize(weight, kind), kind)
    array = reader.read(name)
    assert reader.shape(name) == array.shape
    assert array.dtype == (PLAIN.get(kind, np.float32) if weight.ndim == 2 else np.float32)
    assert reader.dtype(name) == array.dtype.name
    np.testing.assert_array_equal(array, expected.astype(array.dtype), err_msg=name)


def test_biases_are_unpermuted_only_for_llama(tmp_path):
  for family, biases in (('llama', 3), ('llama', 4), ('qwen2', 3)):
    config, path = tiny_config(family, qkv_bias=True), tmp_path / f'{family}-{biases}.gguf'
    weights = random_weights(config)
    if biases == 3:
      weights = {name: w for name, w in weights.items() if not name.endswith('o_proj.bias')}
    writer = new_writer(path, config)
    add_weights(writer, config, weights, Type.F32)
    finish(writer)
    source = open_source(str(path))
    assert source.config == dataclasses.replace(config, family='qwen2' if biases == 3 else 'llama')
    for name in (name for name in weights if name.endswith('bias')):
      np.testing.assert_array_equal(source.reader.read(name), weights[name])


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
  """rope_freqs.weight as llama.cpp's converter computes it."""
  factors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * theta ** (i / head_dim)
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192:
      factors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path, factor):
  config, path = tiny_config('llama', head_dim=64), tmp_path / 'tiny.gguf'
  factors = llama3_factors(config.rope.theta, config.head_dim, factor)
  write_model(path, config, extra=lambda w: w.add_tensor('rope_freqs.weight', factors))
  scaled = RopeConfig(500000.0, Llama3Scaling(factor, 1.0, 4.0, 8192))
  assert gguf_model.GgufReader(path).config.rope == scaled
  assert not any('rope' in name for name in gguf_model.GgufReader(path).names())


@pytest.mark.parametrize('key', ['rope.scaling.factor', 'rope.scale_linear'])
def test_linear_rope_scaling_by_its_new_and_old_name(tmp_path, key):
  path, config = tmp_path / 'tiny.gguf', tiny_config('llama')
  for factor, scaling in ((4.0, LinearScaling(4.0)), (0.0, None), (1.0, None)):
    write_model(path, config, extra=lambda w, f=factor: w.add_float32(f'llama.{key}', f))
    assert gguf_model.GgufReader(path).config.rope == RopeConfig(config.rope.theta, scaling)


def changed(key, value):
  """Replaces a number of the header."""

  def change(writer):
    del writer.kv_data[0][f'llama.{key}']
    (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f'llama.{key}', value)

  return change


def two_scalings(writer):
  writer.add_float32('llama.rope.scaling.factor', 2.0)
  writer.add_tensor(gguf_model.ROPE_FREQS, llama3_factors(500000.0, 16, 8.0))


def factors_of_rope(change):
  factors = change(llama3_factors(500000.0, 16, 8.0)).astype(np.float32)
  return lambda writer: writer.add_tensor(gguf_model.ROPE_FREQS, factors)


def widths(values):
  def change(writer):
    field = writer.kv_data[0]['llama.attention.head_count']
    field.value, field.type = values, gguf_package.GGUFValueType.ARRAY

  return change


REFUSED = {
  'llama.rope.scaling.factor = -2.0': lambda w: w.add_float32('llama.rope.scaling.factor', -2.0),
  'llama.rope.scale_linear = nan': lambda w: w.add_float32('llama.rope.scale_linear', float('nan')),
  'llama.rope.freq_base = 0.0': changed('rope.freq_base', 0.0),
  'llama.attention.layer_norm_rms_epsilon = inf': changed('attention.layer_norm_rms_epsilon', float('inf')),
  'without another scaling': two_scalings,
  'rope_freqs.weight': factors_of_rope(lambda x: 1.01 * x),
  'rope_freqs': factors_of_rope(lambda x: np.full_like(x, np.nan)),
  'llama.expert_count': lambda w: w.add_expert_count(8),
  'llama.rope.scaling.type': lambda w: w.add_rope_scaling_type(gguf_package.RopeScalingType.YARN),
  'llama.attention.sliding_window': lambda w: w.add_sliding_window(128),
  'llama.attention.causal': lambda w: w.add_causal_attention(False),
  '3 widths for 2 layers': widths([4, 4, 4]),
  'llama.rope.dimension_count = 16': changed('attention.key_length', 200_000_001),
  'odd is extra': lambda w: w.add_tensor('odd', np.ones(4, np.float32)),
  'type 20': lambda w: w.add_tensor('output.x', np.zeros((2, 18), np.uint8), raw_dtype=Type.IQ4_NL),
}


@pytest.mark.parametrize('named', REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, named):
  path = tmp_path / 'tiny.gguf'
  write_model(path, tiny_config('llama'), extra=REFUSED[named])
  assert_refused(path, named)


def test_harmless_values_of_those_features_pass(tmp_path):
  def extra(writer):
    writer.add_expert_count(0)
    writer.add_rope_scaling_type(gguf_package.RopeScalingType.NONE)
    writer.add_rope_scaling_factor(2.0)
    writer.add_sliding_window(512)

  path = tmp_path / 'tiny.gguf'
  write_model(path, tiny_config('llama'), extra=extra)
  assert gguf_model.GgufReader(path).config == tiny_config('llama')


@pytest.fixture
def split(tmp_path):
  """The files of a model of at most eight tensors each, written by the gguf package."""
  write_model(tmp_path / 'tiny.gguf', tiny_config('llama'), Type.Q8_0, split_max_tensors=8)
  return [tmp_path / f'tiny-{number:05}-of-00003.gguf' for number in (1, 2, 3)]


def test_a_split_model_is_read_from_all_its_files(split, tmp_path):
  write_model(tmp_path / 'whole.gguf', tiny_config('llama'), Type.Q8_0)
  ours, whole = open_source(str(split[0])), open_source(str(tmp_path / 'whole.gguf'))
  assert ours.config == whole.config and ours.reader.names() == whole.reader.names()
  for name in whole.reader.names():
    np.testing.assert_array_equal(ours.reader.read(name), whole.reader.read(name))


def test_a_split_model_must_be_whole_and_named_by_its_first_file(split, tmp_path):
  first, second, third = split
  assert_refused(second, 'name the first, tiny-00001-of-00003.gguf')
  shutil.copy(first, tmp_path / 'other.gguf')
  assert_refused(tmp_path / 'other.gguf', 'other-00001-of-00003.gguf')
  shutil.copy(second, third)
  assert_refused(first, 'is not part 3 of the 3 files')
  third.unlink()
  assert third.name in refused(open_source, str(first))


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
  assert_refused(tmp_path / 'absent.gguf')
  gemma = gguf_package.GGUFWriter(tmp_path / 'gemma.gguf', 'gemma')
  finish(gemma)
  assert_refused(tmp_path / 'gemma.gguf', "'gemma'", 'llama')
  for content in (b'', b'PK\x03\x04' + bytes(100)):
    (tmp_path / 'bad.gguf').write_bytes(content)
    assert_refused(tmp_path / 'bad.gguf')


def test_a_tensor_that_is_not_where_the_one_before_it_ends_is_refused(tmp_path):
  """As in llama.cpp: it would have another tensor's weights."""
  path = tmp_path / 'tiny.gguf'
  write_model(path, tiny_config('llama'))
  content, name = path.read_bytes(), b'blk.1.ffn_up.weight'
  at = content.index(name) + len(name) + 4 + 2 * 8 + 4
  (offset,) = struct.unpack_from('<Q', content, at)
  for other in (0, offset - 32, offset + 32):
    path.write_bytes(content[:at] + struct.pack('<Q', other) + content[at + 8 :])
    assert_refused(path, name.decode())


SPECIALS = ['<|end|>', '<|start|>', '<｜odd▁begin｜>', '<think>']
MERGES = ['h e', 'l l', 'he ll', 'hell o', 'Ġ hello', '2 0', '20 2', '202 4', 'Ġ Ġ', 'Ã ©']


def add_byte_level(writer, pre: str, **flags: bool) -> list[str]:
  """Metadata of a byte-level tokenizer with a word that no merge reaches; returns its tokens."""
  from tokenizers.pre_tokenizers import ByteLevel

  tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(m.replace(' ', '') for m in MERGES), 'unmerged']
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4))
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(2)
  writer.add_eos_token_id(0)
  for name, flag in flags.items():
    getattr(writer, name)(flag)
  return tokens


def byte_level(path: pathlib.Path, pre: str, **flags: bool):
  writer = new_writer(path, tiny_config('llama'))
  add_byte_level(writer, pre, **flags)
  writer.add_chat_template('{{ messages[0].content }}!')
  finish(writer)
  return gguf_tokenizer.load_tokenizer(path)


@pytest.mark.parametrize(
  ('pre', 'number', 'begins'),
  [
    ('smollm', ['2', '0', '2', '4'], False),
    ('default', ['2024'], False),
    ('llama-bpe', ['202', '4'], True),
    ('deepseek-r1-qwen', ['2', '0', '2', '4'], False),
  ],
)
def test_byte_level_tokenizer(tmp_path, pre, number, begins):
  tokenizer = byte_level(tmp_path / 'tiny.gguf', pre)
  assert tokenizer.tokenize('2024') == number
  assert tokenizer.tokenize(' hello')[-1] == 'Ġhello'
  assert (tokenizer.tokenize('unmerged') == ['unmerged']) == (pre == 'llama-bpe')
  for text in TEXTS:
    ids = tokenizer(text).input_ids
    assert (ids[0] == 2) == begins  # llama.cpp's default where the file does not say
    expected = text.replace('e\u0301', 'é') if 'qwen' in pre else text  # Qwen composes characters
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_special_tokens_are_single_and_bos_and_eos_are_added_as_asked(tmp_path):
  tokenizer = byte_level(tmp_path / 'tiny.gguf', 'smollm', add_add_bos_token=True, add_add_eos_token=True)
  assert tokenizer('<|start|><think>hello<|end|>', add_special_tokens=False).input_ids[:2] == [1, 3]
  assert tokenizer('hello').input_ids == [2, tokenizer.convert_tokens_to_ids('hello'), 0]
  assert tokenizer('2', '0').input_ids.count(2) == 2
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 0)
  assert tokenizer.decode([2, 1, 3], skip_special_tokens=True) == '<think>'
  assert tokenizer.decode([2, 1, 3]) == '<｜odd▁begin｜><|start|><think>'
  assert tokenizer.model_max_length == 512
  assert tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False) == 'hi!'


@pytest.mark.parametrize(
  'key, value',
  [
    ('pre', 'tekken'),
    ('bos_token_id', 4000),
    ('merges', ['h e', 'h q']),
    ('tokens', ['a', 'a']),
    ('tokens', [f't{i}' for i in range(301)]),
  ],
)
def test_unusable_tokenizers_are_refused(tmp_path, key, value):
  path = tmp_path / 'tiny.gguf'

  def extra(writer):
    add_byte_level(writer, 'gpt-2')
    writer.kv_data[0][f'tokenizer.ggml.{key}'].value = value

  write_model(path, tiny_config('llama', vocab_size=300), extra=extra)
  assert str(path) in refused(open_source(str(path)).load_tokenizer)


PIECES = {'▁a': -1, 'b': -9, 'ab': -2, 'bc': -1.5, '▁': -8, 'a': -7, 'c': -6, '▁ab': -4, 'cc': -3, '你': -5}


def sentence_piece(path: pathlib.Path, scores: dict[str, float] = PIECES, prefix: bool = True):
  byte_tokens = [f'<0x{i:02X}>' for i in range(256)]
  tokens = ['<unk>', '<s>', '</s>', *byte_tokens, *scores, '<think>']
  writer = new_writer(path, tiny_config('llama'))
  writer.add_tokenizer_model('llama')
  writer.add_tokenizer_pre('default')
  writer.add_token_list(tokens)
  writer.add_token_scores([0.0] * 259 + [float(s) for s in scores.values()] + [-1000.0])
  writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(scores) + [4])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  writer.add_add_space_prefix(prefix)
  finish(writer)
  return gguf_tokenizer.load_tokenizer(path)


def sentence_piece_reference(text: str, scores: dict[str, float]) -> list[str]:
  """SentencePiece's own loop: join the neighbours whose piece scores highest, the leftmost first."""
  symbols = list('▁' + text.replace(' ', '▁'))
  while True:
    pairs = [a + b for a, b in zip(symbols, symbols[1:], strict=False)]
    known = [(scores[pair], -i) for i, pair in enumerate(pairs) if pair in scores]
    if not known:
      break
    at = -max(known)[1]
    symbols[at : at + 2] = [pairs[at]]
  byte_lists = ([s] if s in scores else [f'<0x{b:02X}>' for b in s.encode()] for s in symbols)
  return [token for tokens in byte_lists for token in tokens]


def test_sentence_piece_tokenizer_merges_by_score(tmp_path):
  tokenizer = sentence_piece(tmp_path / 'tiny.gguf')
  rng = np.random.default_rng(0)
  texts = [''.join(rng.choice(list('abc '), 12)) for _ in range(200)]
  for text in (*texts, '你 ab\n🙂', '  ab  '):
    assert tokenizer.tokenize(text) == sentence_piece_reference(text, PIECES)
    ids = tokenizer(text).input_ids
    assert ids[0] == 1  # BOS by default, as llama.cpp
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
  bare = sentence_piece(tmp_path / 'bare.gguf', prefix=False)
  assert bare.decode(bare(' a').input_ids, skip_special_tokens=True) == ' a'


def test_sentence_piece_without_scores_merges_by_id(tmp_path):
  by_id = {piece: -i for i, piece in enumerate(PIECES)}
  ranked = sentence_piece(tmp_path / 'ranked.gguf', by_id)
  equal = sentence_piece(tmp_path / 'equal.gguf', dict.fromkeys(PIECES, -1000.0))
  for text in ('abc abcc', 'aabbcc', 'a bcc ab'):
    assert equal.tokenize(text) == ranked.tokenize(text)


@pytest.fixture(scope='module')
def demo() -> pathlib.Path:
  path = pathlib.Path(os.environ.get('ADAPT_JAX_DEMO_DATA', ROOT / 'data'))
  path = path / DEMO_NAME if path.is_dir() else path
  if not path.is_file():
    pytest.skip(f'no {DEMO_NAME} in data/ or at $ADAPT_JAX_DEMO_DATA')
  return path


def test_demo_tokenizer_agrees_with_the_true_one(demo):
  """Ids that the original tokenizer made of WikiText-2 decode to its text and encode to themselves."""
  tokenizer = gguf_tokenizer.load_tokenizer(demo)
  for row, text in zip(*reference.windows(), strict=True):
    decoded = tokenizer.decode(row)
    assert decoded.strip('\ufffd') in text
    ids = tokenizer(decoded).input_ids
    edge = 8  # a window may begin or end inside a word, or inside a character
    interior = row[edge:-edge].tolist()
    assert any(ids[i : i + len(interior)] == interior for i in range(2 * edge))
