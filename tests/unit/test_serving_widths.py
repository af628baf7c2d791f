"""`prune.serve`: plans keep to what a runtime asks of widths, and models that do not are refused."""

import pytest

from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.values import serving_multiples
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.pruning import serving_widths
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PruneState
from tests.support.scored import make_config, run

LAYERS = 10  # llm_pruner leaves six of them alone


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'serve,align,kv,ffn',
  [('gguf', 1, 1, 32), ('gguf', 48, 1, 96), ('gguf,tensor_parallel=2', 1, 2, 32)],
)
def test_plans_keep_to_it(method, serve, align, kv, ffn):
  """Together with the multiples of prune.align_ffn; a layer may also stay whole."""
  config = make_config(LAYERS, kv=4, ffn=128)
  pruner = METHODS[method](config, PruneOptions(method=method, serve=serve, align_ffn=align))
  target = max(int(0.75 * count_params(config)), pruner.smallest())
  plan = run(pruner, config, PruneState.start(config), target)[-1].plan
  assert (plan.ffn_widths < 128).any()
  assert not (plan.kv_widths % kv).any()
  assert all(width % ffn == 0 or width == 128 for width in plan.ffn_widths)
  serving_widths.check_model(PruneOptions(serve=serve), plan.pruned_config(config))


@pytest.mark.parametrize(('align', 'ffn'), [(1, 128), (48, 384)])
def test_awq_keeps_whole_groups(align, ffn):
  assert PruneOptions(serve='awq', align_ffn=align).multiples == (1, ffn, 128)


@pytest.mark.parametrize('value', ['', 'vllm', 'tensor_parallel', 'tensor_parallel=', 'tensor_parallel=1.5',
                                   'tensor_parallel=-2', 'tensor_parallel=0'])  # fmt: skip
def test_other_values_are_refused(value):
  with pytest.raises(InputError, match=r'prune\.serve = .*: choose any, gguf, awq, or tensor_parallel=n'):
    serving_multiples(value)


def test_a_hidden_size_that_does_not_fit_is_refused():
  serving_widths.check_hidden('gguf', 96)
  serving_widths.check_hidden('tensor_parallel=7', 96)
  for serve, of in (('gguf', 32), ('awq', 128)):
    with pytest.raises(InputError, match=f'hidden = 90 must be a multiple of {of} for .* = {serve!r}'):
      serving_widths.check_hidden(serve, 90)


@pytest.mark.parametrize('serve', ['gguf', 'awq', 'tensor_parallel=2', 'any,tensor_parallel=9'])
def test_a_model_that_does_not_fit_is_refused(serve):
  config = make_config(LAYERS, kv=3, ffn=48)
  serving_widths.check_model(PruneOptions(serve='tensor_parallel=3'), config)
  with pytest.raises(InputError, match=f'prune.serve = {serve!r}.* layer 0 of model.source has .* divides'):
    serving_widths.check_model(PruneOptions(serve=serve), config)
