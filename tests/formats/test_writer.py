"""Results in each form compute what the model computes; one that does not is an error and not left behind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import choices
from adapt_jax.config.options import ExportOptions
from adapt_jax.export import hf, verify
from adapt_jax.export import writer as writer_module
from adapt_jax.export.gguf import KINDS
from adapt_jax.export.gguf_quantise import K_QUANTS
from adapt_jax.export.padded import pad, padded_config
from adapt_jax.export.writer import LINEAGE, Writer, check_formats, check_result
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import UNIFORM, logits, random_params, random_tokens, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

VOCAB = 321  # transformers adds Qwen's <|endoftext|> to the tokenizer beside a stock Qwen
REPORT = {'model': {'source': 'a/b'}}
# Of hidden size 48. Groups of five heads never divide it; nine heads in three groups do with a fourth.
FIVES = (LayerShape(5, 1, 24), LayerShape(10, 2, 40))
MODELS = {
  **{family: tiny_config(family, vocab_size=VOCAB) for family in FAMILIES},
  'llama-biases': tiny_config('llama', vocab_size=VOCAB, qkv_bias=True),
  'llama-undividing': tiny_config('llama', FIVES, vocab_size=VOCAB),
}


def writer(path, names, tokenizer=None, **options):
  export = ExportOptions(**{'formats': names, 'dtype': 'auto', 'gguf_types': ('auto',)} | options)
  path.mkdir(parents=True, exist_ok=True)
  dtype = writer_module.written_dtype(export, 'float32', False)
  tokenizer = tokenizer or tiny_tokenizer()
  return Writer(export, path, tokenizer=tokenizer, dtype=dtype, generation={}, report=REPORT)


def test_every_form_can_be_asked_for():
  assert tuple(writer_module._WRITERS) == choices('export.formats')
  assert ('auto', *KINDS, *K_QUANTS) == choices('export.gguf_types')


@pytest.mark.parametrize('name', MODELS)
def test_padded_model_is_the_same_function(name):
  config = MODELS[name]
  params, tokens = random_params(config), random_tokens(config)
  wide, padded = padded_config(config), pad(padded_config(config), params)
  assert wide.uniform
  assert wide.family == ('mistral' if name == 'llama-undividing' else config.family)
  if wide.family == 'llama':
    assert wide.layers[0] == LayerShape(12, 4, 64) and config.hidden_size % 12 == 0
  found = logits(wide, padded, tokens)
  np.testing.assert_allclose(found, logits(config, params, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize('form', ['hf_padded', 'gguf_padded'])
def test_wrong_padding_is_noticed(form, tmp_path, monkeypatch):
  config = MODELS['mistral']
  params = random_params(config)

  def wrong(wide, params):
    padded = pad(wide, params)
    padded['layers'][0]['mlp']['down'] *= 0.5
    return padded

  monkeypatch.setattr(writer_module, 'pad', wrong)
  with pytest.raises(InputError, match='its logits, read back'):
    writer(tmp_path, (form,)).write(config, params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', MODELS)
def test_padded_directory_loads_in_a_stock_class(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = MODELS[name]
  params, tokens = random_params(config), random_tokens(config)
  found = writer(tmp_path, ('hf_padded',)).write(config, params)['hf_padded']
  directory = tmp_path / 'hf_padded'
  assert not list(directory.glob('*.py'))
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False).eval()
  assert type(model).__module__.startswith('transformers.models.')
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(theirs, logits(config, params, tokens), rtol=0, atol=1e-4)
  # What the zeros cost is told.
  assert found['params_without_zeros'] == count_params(config)
  assert found['params'] == sum(p.numel() for p in model.parameters()) > count_params(config)


def test_what_is_told_of_an_export(tmp_path, capsys):
  config = MODELS['qwen2']
  params = random_params(config)
  found = writer(tmp_path, ('hf', 'hf_padded')).write(config, params)
  assert list(found) == ['hf', 'hf_padded']
  for name, values in found.items():
    size = (tmp_path / name / 'model.safetensors').stat().st_size
    assert values['bytes'] == size and values['type'] == 'float32'
    assert values['logit_difference'] < 1e-4 and values['same_token'] == 1
    stored = json.loads((tmp_path / name / LINEAGE).read_text())
    assert stored == REPORT | {'files': {'model.safetensors': size}}
  assert found['hf']['logit_difference'] == 0  # the same bits
  told = capsys.readouterr().out.splitlines()
  assert 'largest logit difference 0, same token at 100.0% of positions' in told[0]
  assert 'parameters, zeros add ' in told[1]


def test_rounding_counts_as_difference_but_is_no_error(tmp_path):
  config = MODELS['llama']
  found = writer(tmp_path, ('hf',), dtype='bfloat16').write(config, random_params(config))['hf']
  assert found['type'] == 'bfloat16' and found['logit_difference'] > 1e-3
  assert open_source(str(tmp_path / 'hf')).dtype == 'bfloat16'


def test_gguf_files_of_all_types_are_one_directory(tmp_path):
  config = MODELS['llama']
  found = writer(tmp_path, ('gguf',), gguf_types=('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')).write(
    config, random_params(config)
  )
  worst = [values['logit_difference'] for values in found.values()]
  assert worst[0] < 1e-4 and all(1e-4 < x < 10 for x in worst[1:])
  for file, values in found.items():
    assert file == f'gguf/model-{values["type"]}.gguf'
    assert values['bytes'] == (tmp_path / file).stat().st_size
    assert open_source(str(tmp_path / file)).config == config
  assert {p.name for p in (tmp_path / 'gguf').iterdir()} == {
    LINEAGE,
    'README.md',
    *(f.split('/')[1] for f in found),
  }
  assert found['gguf/model-F32.gguf']['same_token'] == 1


@pytest.mark.parametrize('dtype, kind', [('auto', 'F32'), ('bfloat16', 'BF16'), ('float16', 'F16')])
def test_gguf_is_of_the_exported_dtype_unless_asked(dtype, kind, tmp_path):
  config = MODELS['llama']
  found = writer(tmp_path, ('gguf',), dtype=dtype, gguf_types=('auto', kind)).write(
    config, random_params(config)
  )
  assert list(found) == [f'gguf/model-{kind}.gguf']


def test_tensors_of_several_dtypes_keep_their_own(tmp_path):
  """As a BF16 .gguf file has them, whose norms are F32."""
  config = MODELS['llama']
  writer(tmp_path, ('gguf',), gguf_types=('BF16',)).write(config, random_params(config))
  source = open_source(str(tmp_path / 'gguf/model-BF16.gguf'))
  found = writer(tmp_path / 'again', ('hf', 'hf_padded')).write(source.config, source.load_params())
  assert [values['logit_difference'] < 1e-4 for values in found.values()] == [True, True]
  written = open_source(str(tmp_path / 'again/hf')).reader
  assert written.dtype('model.norm.weight') == 'float32'
  assert written.dtype('model.layers.0.mlp.up_proj.weight') == 'bfloat16'


@pytest.mark.parametrize('name', MODELS)
def test_a_model_with_the_same_bits_is_not_computed_with(name, tmp_path, monkeypatch):
  monkeypatch.setattr(verify.llama, 'apply', None)
  found = writer(tmp_path, ('hf',)).write(MODELS[name], random_params(MODELS[name]))['hf']
  assert (found['logit_difference'], found['same_token']) == (0, 1)


@pytest.mark.parametrize('stored', [False, True])
def test_a_bit_that_differs_shows_in_the_logits(stored, tmp_path, monkeypatch):
  config = MODELS['llama']
  params = random_params(config)
  if stored:
    hf.write_hf(config, params, tmp_path / 'source')
    params = open_source(str(tmp_path / 'source')).stored_params()

  def save(config, params, *args, **options):
    embed = np.array(params['embed'])
    embed[3].view(np.uint32)[:] ^= 1
    return save_params(config, params | {'embed': embed}, *args, **options)

  monkeypatch.setattr(hf, 'save_params', save)
  found = writer(tmp_path / 'out', ('hf',)).write(config, params)['hf']
  assert 0 < found['logit_difference'] < 1e-4


@pytest.mark.parametrize('content', ['{"a": 1}', '{"model": "x"}', '{"model": {"source": 1}}'])
def test_a_lineage_of_another_program_is_none(content, tmp_path):
  config = MODELS['llama']
  writer(tmp_path, ('hf',)).write(config, random_params(config))
  assert writer_module.lineage(open_source(str(tmp_path / 'hf'))) == REPORT
  (tmp_path / 'hf' / LINEAGE).write_text(content)
  assert writer_module.lineage(open_source(str(tmp_path / 'hf'))) is None


def changed(name):
  """A writer of weights with one that is another."""

  def save(config, params, directory, *args, **options):
    wrong = dict(params['layers'][1])
    block, leaf = name.split('.')
    value = jnp.asarray(wrong[block][leaf])
    wrong[block] = wrong[block] | {leaf: value[::-1] if leaf != 'o' else value[:, ::-1]}
    layers = [wrong if i == 1 else layer for i, layer in enumerate(params['layers'])]
    return save_params(config, params | {'layers': layers}, directory, *args, **options)

  return save


@pytest.mark.parametrize('leaf', ['attention.q', 'attention.o', 'mlp.up'])
def test_an_export_that_computes_something_else_is_not_left_behind(leaf, tmp_path, monkeypatch):
  """Groups in another order; the export that was there before stays."""
  config = MODELS['llama']
  params = random_params(config)
  writer(tmp_path, ('hf',)).write(config, params)
  before = {p.name: p.read_bytes() for p in (tmp_path / 'hf').iterdir()}
  monkeypatch.setattr(hf, 'save_params', changed(leaf))
  with pytest.raises(InputError, match='its logits, read back, have a relative error of'):
    writer(tmp_path, ('hf', 'hf_padded')).write(config, params)
  assert {p.name for p in tmp_path.iterdir()} == {'hf'}
  assert {p.name: p.read_bytes() for p in (tmp_path / 'hf').iterdir()} == before


def test_a_tokenizer_that_reads_back_as_another_one_is_refused(tmp_path):
  class Forgetful:
    """Saves itself without its merges."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self):
      self.tokenizer = tiny_tokenizer()

    def __call__(self, text):
      return self.tokenizer(text)

    def save_pretrained(self, directory):
      self.tokenizer.save_pretrained(directory)
      path = directory / 'tokenizer.json'
      fields = json.loads(path.read_text())
      fields['model']['merges'] = []
      path.write_text(json.dumps(fields))

  config = MODELS['llama']
  with pytest.raises(InputError, match='its tokenizer, read back, encodes text differently'):
    writer(tmp_path, ('hf',), Forgetful()).write(config, random_params(config))
  assert not list(tmp_path.iterdir())


def test_forms_that_cannot_hold_the_model_are_refused_before():
  options = ExportOptions(('hf_padded',), 'auto', ('auto',))
  biased = dataclasses.replace(MODELS['qwen2'], output_bias=True)
  with pytest.raises(InputError, match='but no stock class has the biases of o_proj and down_proj'):
    check_formats(options, biased)
  fives = dataclasses.replace(MODELS['llama-undividing'], qkv_bias=True)
  assert padded_config(fives).layers[0].widths == (12, 2, 40)  # the class for fives has no biases
  many = tiny_config('llama', (LayerShape(50, 1, 24),), vocab_size=VOCAB, qkv_bias=True)
  with pytest.raises(InputError, match='stock Llama refuses 50 heads at hidden size 48'):
    check_formats(options, many)
  check_formats(ExportOptions(('hf',), 'auto', ('auto',)), biased)
  # The result's layers will differ, whatever the source's do.
  options = ExportOptions(('gguf',), 'auto', ('auto',))
  uniform = tiny_config('qwen3', UNIFORM)
  check_formats(options, uniform)
  with pytest.raises(InputError, match='cannot hold a qwen3 model with widths that differ by layer'):
    check_result(options, uniform)
  check_result(options, uniform, whole_layers=True)
  wide = dataclasses.replace(UNIFORM[0], ffn=2 * UNIFORM[0].ffn)  # if the first layer stays
  with pytest.raises(InputError, match='cannot hold a qwen3 model with widths that differ by layer'):
    check_result(options, uniform.with_layers((wide, *UNIFORM)), whole_layers=True)


def test_fewer_layers_break_a_pattern_that_llama_cpp_takes_for_granted():
  """Every second layer of Gemma 2 has a window, beginning with the first."""
  options = ExportOptions(('gguf_padded',), 'auto', ('auto',))
  gemma = tiny_config('gemma2', attention_scale=12**-0.5, tie_embeddings=True)
  check_result(options, gemma)
  with pytest.raises(InputError, match='windows or rotary embeddings in other layers'):
    check_result(options, gemma, whole_layers=True)
  check_result(options, gemma.with_layers(gemma.layers[:1]), whole_layers=True)  # the last layer stays


@pytest.mark.parametrize('place', [jax.device_put, np.asarray])
def test_weights_beyond_float16(tmp_path, place):
  config = MODELS['llama']
  params = random_params(config)
  params['embed'] = np.array(params['embed'])
  params['embed'][-1, 0] = 1e6  # of a token that no checked text has
  with pytest.raises(InputError, match='^tensor model.embed_tokens.weight .* choose bfloat16 or float32 as'):
    writer(tmp_path, ('hf',), dtype='float16').write(config, jax.tree.map(place, params))
  assert not list(tmp_path.iterdir())
