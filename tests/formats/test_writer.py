"""Results in each form compute what the model computes; one that does not is an error and not left behind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.options import ExportOptions
from adapt_jax.export import hf, verify
from adapt_jax.export import writer as writer_module
from adapt_jax.export.padded import pad, padded_config
from adapt_jax.export.writer import LINEAGE, Writer, check_formats, check_result
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.reports.origin import Origin
from tests.support.helpers import UNIFORM, logits, random_params, random_tokens, refused, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

VOCAB = 321  # transformers adds Qwen's <|endoftext|> to the tokenizer beside a stock Qwen
REPORT = Origin('a/b', hub=True).report()
# Of hidden size 48. Groups of five heads never divide it; nine heads in three groups do with a fourth.
FIVES = (LayerShape(5, 1, 24), LayerShape(10, 2, 40))
LLAMA = tiny_config('llama', vocab_size=VOCAB)
PADDED = {
  'llama': LLAMA,
  'llama-biases': tiny_config('llama', vocab_size=VOCAB, qkv_bias=True),
  'llama-undividing': tiny_config('llama', FIVES, vocab_size=VOCAB),
  'qwen2': tiny_config('qwen2', vocab_size=VOCAB),
  'gemma3_text': tiny_config('gemma3_text', vocab_size=VOCAB),
  'phi3': tiny_config('phi3', vocab_size=VOCAB),
}


def writer(path, names, tokenizer=None, **options):
  export = ExportOptions(**{'formats': names, 'dtype': 'auto', 'gguf_types': ('auto',)} | options)
  path.mkdir(parents=True, exist_ok=True)
  dtype = None if export.dtype == 'auto' else np.dtype(export.dtype)
  tokenizer = tokenizer or tiny_tokenizer()
  return Writer(export, path, tokenizer=tokenizer, dtype=dtype, generation={}, report=REPORT)


@pytest.mark.parametrize('name', PADDED)
def test_padded_directory_computes_the_same_in_a_stock_class(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = PADDED[name]
  wide, params, tokens = padded_config(config), random_params(config), random_tokens(config)
  assert wide.uniform
  assert wide.family == ('mistral' if name == 'llama-undividing' else config.family)
  facts = writer(tmp_path, ('hf_padded',)).write(config, params)['hf_padded']
  directory = tmp_path / 'hf_padded'
  assert not list(directory.glob('*.py'))
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False).eval()
  assert type(model).__module__.startswith('transformers.models.')
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(theirs, logits(config, params, tokens), rtol=0, atol=1e-4)
  # What the zeros cost is told.
  assert facts['params_without_zeros'] == count_params(config)
  assert facts['params'] == sum(p.numel() for p in model.parameters()) > count_params(config)


@pytest.mark.parametrize('form', ['hf_padded', 'gguf_padded'])
def test_wrong_padding_is_noticed(form, tmp_path, monkeypatch):
  params = random_params(LLAMA)

  def wrong(wide, params):
    padded = pad(wide, params)
    padded['layers'][0]['mlp']['down'] *= 0.5
    return padded

  monkeypatch.setattr(writer_module, 'pad', wrong)
  assert 'read back' in refused(writer(tmp_path, (form,)).write, LLAMA, params)
  assert not list(tmp_path.iterdir())


def test_what_is_told_of_an_export(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(verify.llama, 'apply', None)  # equal bits need no logits
  facts = writer(tmp_path, ('hf',)).write(LLAMA, random_params(LLAMA))['hf']
  size = (tmp_path / 'hf/model.safetensors').stat().st_size
  assert facts == {'type': 'float32', 'bytes': size, 'logit_difference': 0, 'same_token': 1}
  stored = json.loads((tmp_path / 'hf' / LINEAGE).read_text())
  assert stored == REPORT | {'files': {'model.safetensors': size}}
  assert 'same token at 100.0% of positions' in capsys.readouterr().out


def test_rounding_counts_as_difference_but_is_no_error(tmp_path):
  facts = writer(tmp_path, ('hf',), dtype='bfloat16').write(LLAMA, random_params(LLAMA))['hf']
  assert facts['type'] == 'bfloat16' and facts['logit_difference'] > 1e-3
  assert open_source(str(tmp_path / 'hf')).dtype == 'bfloat16'


@pytest.mark.parametrize('form', ['hf', 'gguf'])
def test_weights_that_are_rounded_already_need_no_logits(form, tmp_path, monkeypatch):
  """As after training: fp32 arrays of numbers in bfloat16."""
  monkeypatch.setattr(verify.llama, 'apply', None)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), random_params(LLAMA))
  (facts,) = writer(tmp_path, (form,), dtype='bfloat16').write(LLAMA, params).values()
  assert facts['logit_difference'] == 0 and facts['type'] in ('bfloat16', 'BF16')


def test_gguf_files_of_all_types_are_one_directory(tmp_path):
  options = {'gguf_types': ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')}
  written = writer(tmp_path, ('gguf',), **options).write(LLAMA, random_params(LLAMA))
  worst = [facts['logit_difference'] for facts in written.values()]
  assert worst[0] < 1e-4 and all(1e-4 < x < 10 for x in worst[1:])
  for file, facts in written.items():
    assert file == f'gguf/model-{facts["type"]}.gguf'
    assert facts['bytes'] == (tmp_path / file).stat().st_size
    assert open_source(str(tmp_path / file)).config == LLAMA
  names = {p.name for p in (tmp_path / 'gguf').iterdir()}
  assert names == {LINEAGE, 'README.md', *(file.split('/')[1] for file in written)}


@pytest.mark.parametrize('dtype, kind', [('auto', 'F32'), ('bfloat16', 'BF16')])
def test_gguf_is_of_the_exported_dtype_unless_asked(dtype, kind, tmp_path):
  options = {'dtype': dtype, 'gguf_types': ('auto', kind)}
  written = writer(tmp_path, ('gguf',), **options).write(LLAMA, random_params(LLAMA))
  assert list(written) == [f'gguf/model-{kind}.gguf']


def test_tensors_of_several_dtypes_keep_their_own(tmp_path):
  """As a BF16 .gguf file has them, whose norms are F32."""
  writer(tmp_path, ('gguf',), gguf_types=('BF16',)).write(LLAMA, random_params(LLAMA))
  source = open_source(str(tmp_path / 'gguf/model-BF16.gguf'))
  written = writer(tmp_path / 'again', ('hf', 'hf_padded')).write(source.config, source.load_params())
  assert all(facts['logit_difference'] < 1e-4 for facts in written.values())
  reader = open_source(str(tmp_path / 'again/hf')).reader
  assert reader.dtype('model.norm.weight') == 'float32'
  assert reader.dtype('model.layers.0.mlp.up_proj.weight') == 'bfloat16'


def test_a_bit_that_differs_shows_in_the_logits(tmp_path, monkeypatch):
  config = LLAMA
  hf.write_hf(config, random_params(config), tmp_path / 'source')
  params = open_source(str(tmp_path / 'source')).stored_params()

  def save(config, params, *args, **options):
    embed = np.array(params['embed'])
    embed[3].view(np.uint32)[:] ^= 1
    return save_params(config, params | {'embed': embed}, *args, **options)

  monkeypatch.setattr(hf, 'save_params', save)
  found = writer(tmp_path / 'out', ('hf',)).write(config, params)['hf']
  assert 0 < found['logit_difference'] < 1e-4


def test_a_lineage_of_another_program_is_none(tmp_path):
  config = LLAMA
  writer(tmp_path, ('hf',)).write(config, random_params(config))
  assert writer_module.lineage(open_source(str(tmp_path / 'hf'))) == REPORT
  (tmp_path / 'hf' / LINEAGE).write_text('{"a": 1}')
  assert writer_module.lineage(open_source(str(tmp_path / 'hf'))) is None


def test_an_export_that_computes_something_else_is_not_left_behind(tmp_path, monkeypatch):
  """Groups of heads in another order; the export that was there before stays."""
  config, params = LLAMA, random_params(LLAMA)

  def save(config, params, *args, **options):
    first, second, *rest = params['layers']
    attention = second['attention'] | {'q': second['attention']['q'][::-1]}
    changed = params | {'layers': [first, second | {'attention': attention}, *rest]}
    return save_params(config, changed, *args, **options)

  writer(tmp_path, ('hf',)).write(config, params)
  before = {p.name: p.read_bytes() for p in (tmp_path / 'hf').iterdir()}
  monkeypatch.setattr(hf, 'save_params', save)
  assert 'read back' in refused(writer(tmp_path, ('hf', 'hf_padded')).write, config, params)
  assert {p.name for p in tmp_path.iterdir()} == {'hf'}
  assert {p.name: p.read_bytes() for p in (tmp_path / 'hf').iterdir()} == before


def test_a_tokenizer_that_reads_back_as_another_one_is_refused(tmp_path):
  tokenizer = tiny_tokenizer()
  save = tokenizer.save_pretrained

  def without_merges(directory):
    save(directory)
    path = directory / 'tokenizer.json'
    fields = json.loads(path.read_text())
    fields['model']['merges'] = []
    path.write_text(json.dumps(fields))

  tokenizer.save_pretrained = without_merges
  write = writer(tmp_path, ('hf',), tokenizer).write
  assert 'gives other ids' in refused(write, LLAMA, random_params(LLAMA))
  assert not list(tmp_path.iterdir())


def test_forms_that_cannot_hold_the_model_are_refused_before():
  options = ExportOptions(('hf_padded',), 'auto', ('auto',))
  biased = dataclasses.replace(PADDED['qwen2'], output_bias=True)
  assert "'hf_padded'" in (message := refused(check_formats, options, biased)) and 'o_proj' in message
  fives = dataclasses.replace(PADDED['llama-undividing'], qkv_bias=True)
  assert padded_config(fives).layers[0].widths == (12, 2, 40)  # the class for fives has no biases
  many = tiny_config('llama', (LayerShape(50, 1, 24),), vocab_size=VOCAB, qkv_bias=True)
  assert '50 heads at hidden size 48' in refused(check_formats, options, many)
  check_formats(ExportOptions(('hf',), 'auto', ('auto',)), biased)
  # The result's layers will differ, whatever the source's do.
  options = ExportOptions(('gguf',), 'auto', ('auto',))
  uniform = tiny_config('qwen3', UNIFORM)
  check_formats(options, uniform)
  assert 'differ by layer' in refused(check_result, options, uniform)
  check_result(options, uniform, whole_layers=True)
  wide = dataclasses.replace(UNIFORM[0], ffn=2 * UNIFORM[0].ffn)  # if the first layer stays
  assert 'differ by layer' in refused(check_result, options, uniform.with_layers((wide, *UNIFORM)), True)


def test_fewer_layers_break_a_pattern_that_llama_cpp_takes_for_granted():
  """Every second layer of Gemma 2 has a window, beginning with the first."""
  options = ExportOptions(('gguf_padded',), 'auto', ('auto',))
  gemma = tiny_config('gemma2', attention_scale=12**-0.5, tie_embeddings=True)
  check_result(options, gemma)
  assert 'in other layers' in refused(check_result, options, gemma, whole_layers=True)
  check_result(options, gemma.with_layers(gemma.layers[:1]), whole_layers=True)  # the last layer stays


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
  export = writer(tmp_path / 'out', ('gguf',))
  (tmp_path / 'out').rmdir()
  (tmp_path / 'out').touch()
  assert 'choose another place' in refused(export.write, LLAMA, random_params(LLAMA))


@pytest.mark.parametrize('form', ['hf', 'gguf'])
def test_weights_beyond_float16(form, tmp_path):
  params = random_params(LLAMA)
  params['embed'][-1, 0] = 1e6  # of a token that no checked text has
  write = writer(tmp_path, (form,), dtype='float16').write
  assert 'model.embed_tokens.weight' in refused(write, LLAMA, jax.device_put(params))
  assert not list(tmp_path.iterdir())
