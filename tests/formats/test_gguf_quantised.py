"""Files quantised by llama.cpp itself: read as llama.cpp computes with them."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from adapt_jax.config.options import ExportOptions
from adapt_jax.export import formats, gguf_quantise
from adapt_jax.export.gguf import write_gguf
from adapt_jax.export.writer import Writer, check_formats
from adapt_jax.models.config import LayerShape
from adapt_jax.models.formats.gguf_header import TENSOR_TYPES, open_file
from adapt_jax.models.formats.hf_weights import leaves
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import logits, new_params, random_params, random_tokens, refused, tiny_config
from tests.support.llama_cpp import Job, ask, needs_llama_cpp, quantise
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytestmark = needs_llama_cpp
# Rows of K-quants are whole blocks of 256 weights.
CONFIG = tiny_config(
  'llama', (LayerShape(4, 2, 512),) * 3, vocab_size=330, hidden_size=256, head_dim=64, tie_embeddings=False
)
# What llama-quantize takes; a file of Q3_K_M holds Q3_K.
KINDS = ('Q5_0', 'Q5_1', 'Q2_K', 'Q3_K_M', 'Q4_K_M', 'Q5_K_M', 'Q6_K')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A file of each kind, and what llama.cpp makes of it in F32."""
  path = tmp_path_factory.mktemp('quantised')
  write_gguf(
    CONFIG, random_params(CONFIG), path / 'F32.gguf', tokenizer=tiny_tokenizer(), kind='F32', name='tiny'
  )
  made = [(path / 'F32.gguf', path / f'{kind}.gguf', f'MOSTLY_{kind}') for kind in KINDS]
  quantise(*made, *((file, file.with_stem(f'{file.stem} in F32'), 'ALL_F32') for _, file, _ in made))
  return path


@pytest.mark.parametrize('kind', KINDS)
def test_weights_are_those_of_llama_cpp(kind, files):
  path = files / f'{kind}.gguf'
  held = {TENSOR_TYPES[tensor.type].name for tensor in open_file(path).tensors.values()}
  source, wanted = open_source(str(path)), open_source(str(files / f'{kind} in F32.gguf'))
  assert kind.removesuffix('_M') in held and source.config == wanted.config == CONFIG
  assert {tensor.type for tensor in open_file(wanted.path).tensors.values()} == {int(Type.F32)}
  for leaf in leaves(CONFIG):
    theirs = wanted.reader.read(leaf.name)
    whole = source.reader.read(leaf.name)
    np.testing.assert_allclose(whole, theirs, atol=1e-6 * np.abs(theirs).max())
    part = tuple(slice(n // 5, n - n // 7) for n in whole.shape)  # begins and ends inside blocks
    np.testing.assert_array_equal(source.reader.read(leaf.name, part), whole[part], err_msg=leaf.name)


def export(path, **options):
  """The config of a pruned model, with rows of 256, 512 and 768 weights, and what writes it as gguf."""
  config = tiny_config(
    'llama',
    (LayerShape(4, 2, 512), LayerShape(2, 1, 256), LayerShape(4, 2, 768)),
    vocab_size=330,
    hidden_size=256,
    head_dim=64,
    output_bias=True,
  )
  report = {'model': {'source': 'a/b'}}
  fields = {'tokenizer': tiny_tokenizer(), 'dtype': None, 'generation': {}, 'report': report}
  written = Writer(ExportOptions(formats=('gguf',), **options), path, **fields)
  return config, lambda: written.write(config, new_params(config, scale=1.0))


def test_k_quants_of_a_pruned_model_run_in_llama_cpp(tmp_path, monkeypatch):
  """Modules of the current directory are not run."""
  for name in ('gguf', 'cffi', 'llama_cpp_py_sync'):
    (tmp_path / f'{name}.py').write_text('raise SystemExit(1)')
  monkeypatch.chdir(tmp_path)
  config, write = export(tmp_path, gguf_types=('Q6_K', 'Q4_K_M'))
  found, rows = write(), random_tokens(config)
  files = {kind: tmp_path / f'gguf/model-{kind}.gguf' for kind in ('Q6_K', 'Q4_K_M')}
  assert [facts['type'] for facts in found.values()] == [*files]
  assert {*(tmp_path / 'gguf').glob('*.gguf')} == {*files.values()}  # not what they were made from
  answers = ask({kind: Job(path, [], rows) for kind, path in files.items()})
  for kind, path in files.items():
    down = {tensor.type for name, tensor in open_file(path).tensors.items() if 'ffn_down.weight' in name}
    assert down <= {int(Type.Q6_K), int(Type.Q4_K)}
    source = open_source(str(path))
    assert source.config == config
    ours = np.asarray(logits(config, source.load_params(), rows))
    assert np.abs(ours - answers[kind].logits).mean() < 0.1 * ours.std()


def test_without_llama_cpp_a_k_quant_is_refused_before_the_run(monkeypatch):
  options = ExportOptions(formats=('hf', 'gguf'), gguf_types=('Q8_0', 'Q5_K_M'))
  check_formats(options, CONFIG)
  monkeypatch.setattr(gguf_quantise, '_PACKAGE', 'no_such_package')
  message = refused(check_formats, options, CONFIG)
  assert "export.gguf_types has 'Q5_K_M'" in message and 'adapt-jax[quantise]' in message
  check_formats(ExportOptions(formats=('hf',), gguf_types=('Q5_K_M',)), CONFIG)


def test_what_llama_cpp_refuses_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
  _, write = export(tmp_path, gguf_types=('Q4_K_M',))
  monkeypatch.setattr(formats, 'write_gguf', lambda config, params, file, **_: file.touch())
  assert 'model-Q4_K_M.gguf: llama.cpp could not write' in refused(write)
  assert not [*tmp_path.iterdir()]
