"""The real model: SmolLM2-135M-Instruct from its GGUF file, against transformers and the authors' program.

Skipped where the demo has not been fetched; `make test` does it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.export.hf import write_hf
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import backend, llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.widths import normalise
from tests.support.reference import MODEL, ROWS, SLACK, Reference, overlap, reference_pruner, windows

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason='the demo model is not there: make fetch')
# Tests are compiled in a hurry (tests/conftest.py); these compute for minutes, and are worth LLVM's work.
WITH_CARE = {
  'xla_backend_optimization_level': 3,
  'xla_llvm_disable_expensive_passes': False,
  'xla_cpu_use_fusion_emitters': True,
}


@pytest.fixture(autouse=True)
def compiled_with_care(monkeypatch):
  monkeypatch.setattr(backend, '_CPU_OPTIONS', backend._CPU_OPTIONS | WITH_CARE)


@pytest.fixture(scope='module')
def source():
  return open_source(str(MODEL))


@pytest.fixture(scope='module')
def params(source):
  return source.load_params()


def test_logits_equal_those_of_transformers(source, params, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  tokenizer = source.load_tokenizer()
  write_hf(source.config, params, tmp_path / 'hf', tokenizer=tokenizer)
  text = 'In 1947 the committee met 12 times; its report, printed the year after, was never read aloud.'
  ids = np.array([tokenizer(text)['input_ids']])
  with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32)
    theirs = model(torch.tensor(ids)).logits.numpy()
  ours = np.asarray(jax.jit(lambda p, t: llama.apply(source.config, p, t))(params, ids))
  assert np.abs(ours - theirs).max() < 1e-4
  np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parity
def test_first_step_reproduces_the_references_scores(source, params):
  """Cosines to 1e-4 and Taylor sums to 1e-3 (median), with query heads credited to their own KV group."""
  golden, tokens = Reference().figures, windows()[0][:ROWS]
  # The reference ran on weights rounded to bfloat16 and kept in fp32.
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
  stacked = surgery.stack(rounded, PrunePlan.dense(source.config), jnp.float32)
  scores = jax.device_get(
    jax.jit(Scorer(source.config, micro_batch=16), compiler_options=WITH_CARE)(stacked, tokens)
  )
  np.testing.assert_allclose(-scores.distance, golden['cosine_mean'], atol=1e-4)
  np.testing.assert_allclose(normalise(scores.distance), golden['normalized_importance'], atol=1e-4)
  np.testing.assert_allclose(scores.loss, golden['batch_losses'].mean(), rtol=1e-5)
  batches = len(golden['batch_losses'])  # its gradients are summed over batches, ours are a mean

  def difference(ours, theirs):
    return np.median(np.abs(ours * batches - theirs) / theirs)

  assert difference(scores.ffn, golden['ffn_scores']) < 1e-3
  assert difference(scores.kv, golden['kv_scores']) < 1e-3


@pytest.mark.parity
@pytest.mark.parametrize('start, stop', [(15, 16), (0, 11)])
def test_steps_of_the_reference(start, stop):
  """Its rule on its tokens, and its state after step `start`: widths, and given masks.

  In step 16 a KV group goes in 26 of 30 layers. From the start the paths part after step 11, as those of two
  chaotic runs do: docs/notes/parity.md.
  """
  pruner, params = reference_pruner()
  reference, seen = Reference(), []

  def on_step(state, record):
    kv, ffn, sparsity = (reference.figures[name][record.step - 1] for name in ('kv', 'ffn', 'sparsity'))
    np.testing.assert_array_equal(record.kv_groups, kv)
    # Widths are rounded down: where the reference stands within 1e-5 of a border in s, ours may be beyond it.
    exact = 1536 * (1 - sparsity)
    on_border = np.abs(exact - exact.round()) < 1536e-5
    differing = np.abs(np.array(record.ffn) - ffn)
    assert not differing[~on_border].any() and differing.max() <= 1
    np.testing.assert_allclose(record.sparsity, sparsity, atol=1e-5)
    if kept := reference.kept(record.step):
      if record.step == start + 1:
        np.testing.assert_array_equal(np.array(state.plan.kv), kept['kv'])
        # One pair of near-equal channels, or the width that differs.
        assert np.sum(np.array(state.plan.ffn) != kept['mlp']) <= 2
      assert overlap(np.array(state.plan.kv), kept['kv']) >= 0.98
      assert overlap(np.array(state.plan.ffn), kept['mlp']) >= 0.98
    seen.append(record.step)

  dense = PruneState.start(pruner.config)
  state = reference.state(start) if start else dense
  target = int(reference.figures['params'][stop - 1]) + SLACK
  for step in pruner.prune(pruner.stack(params, dense.plan), dense.plan, state, target, 'prune'):
    on_step(*step)
  assert seen == list(range(start + 1, stop + 1))
