"""A run's programs, compiled by the compilers of NVIDIA GPUs and TPUs on a machine that has neither.

make test-accelerators installs the compilers and runs these tests; make test leaves them out.
"""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import MeshOptions
from adapt_jax.configs import adapt, base
from adapt_jax.machine import mesh, targets
from adapt_jax.machine.compiled_text import CompiledText
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.modes.estimate_programs import Footprint, programs, stage_configs

pytestmark = pytest.mark.skipif(
  any(map(targets.missing, TARGETS.values())),
  reason='the compilers are not installed: make test-accelerators',
)
SMALL = ModelConfig('llama', 32_000, 1024, 64, (LayerShape(16, 8, 4096),) * 2, RopeConfig(5e5), 1e-5, True)
# One layer of LLaMA-3.1-8B.
LAYER = ModelConfig(
  'llama', 128_256, 4096, 128, (LayerShape(32, 8, 14_336),), RopeConfig(5e5), 1e-5, tie_embeddings=False
)
EIGHT = [('h100', 8), ('tpu-v5p', 8)]


@contextlib.contextmanager
def described(target, devices, sizes=MeshOptions()):  # noqa: B008
  """A mesh of such devices; platform of the target."""
  found = mesh.make_mesh(sizes, targets.devices(TARGETS[target], devices))
  with jax.set_mesh(found):
    yield TARGETS[target].compiled_for


def options(recipe, **train):
  values = recipe.get_config()
  values.prune.target = 0.8
  values.prune.calibration.samples, values.prune.calibration.length = 16, 256
  values.train.update({'tokens': 10**8, 'batch': 64, 'micro_batch': 4, 'length': 512, **train})
  return from_dict(values.to_dict())


def compiled(compile_program):
  """The text of a program of a `Footprint`, compiled on the current mesh, and the program."""
  texts = []
  with pytest.MonkeyPatch.context() as patch:
    keep = lambda text: texts.append(text) or CompiledText(text)  # noqa: E731
    patch.setattr('adapt_jax.modes.estimate_programs.CompiledText', keep)
    program = compile_program()
  return texts[0], program


def training_step(plan):
  return compiled(lambda: plan.training(plan.config))


@pytest.mark.parametrize('recipe', [base, adapt], ids=['base', 'adapt'])
@pytest.mark.parametrize('target,devices', [('h100', 1), *EIGHT])
def test_every_program_compiles(target, devices, recipe):
  """Curvature, least squares, healing and distillation; Taylor scores and cross-entropy."""
  asked = options(recipe)
  with described(target, devices) as platform:
    found = programs(Footprint(asked, SMALL, jnp.bfloat16, platform), stage_configs(asked, SMALL))
  compiled = {name.split()[0].strip(','): x for name, x in found.items() if x.flops}
  more = {'compensation', 'teacher', 'healing'} if recipe is base else set()
  assert set(compiled) == {'scoring', 'training'} | more
  for program in compiled.values():
    # Each reads its weights, and keeps less than forty times their size while it runs.
    assert program.moved > program.arguments
    assert 0 < program.temporary < 40 * 4 * count_params(SMALL)
    assert bool(program.sent) == (devices > 1)


@pytest.mark.parametrize('target,devices', EIGHT)
def test_a_step_of_a_layer_of_8b_holds_shares_and_sends_the_head_once(target, devices):
  """Two micro-batches with many chunks of tokens each. Moments and weights are split over eight devices."""
  asked = options(base, batch=128, micro_batch=8, length=1024)
  with described(target, devices) as platform:
    text, memory = training_step(Footprint(asked, LAYER, jnp.bfloat16, platform))
  sent = CompiledText(text).collectives()
  V, D = LAYER.vocab_size, LAYER.hidden_size
  share = (12 * count_params(LAYER) + 2 * count_params(LAYER)) / devices  # and the teacher in bfloat16
  assert memory.arguments == pytest.approx(share, rel=0.02)
  # The logits of all tokens of a micro-batch would be 4 GB; the whole head's gradient in fp32 is 2.1 GB.
  assert memory.temporary < 16e9
  heads = [x for x in sent if x.bytes >= 2 * V * D]
  gathered = [x for x in heads if x.kind == 'all-gather']
  assert sum(x.times for x in gathered) == 2  # the student's and the teacher's
  reduced = [x for x in heads if 'reduce' in x.kind]
  assert sum(x.times for x in reduced) == 1
  of_head = sum(x.bytes * x.times for x in heads)
  of_layer = sum(x.bytes * x.times for x in sent) - of_head
  assert of_head < 0.05 * 32 * of_layer  # of all 32 layers


@pytest.mark.parametrize('name', ['scoring', 'compensation'])
@pytest.mark.parametrize('target,devices', EIGHT)
def test_pruning_a_layer_of_8b_sends_its_mlp_and_moments_once(target, devices, name):
  """In four micro-batches. Only rows of tokens, blocks of columns and smaller weights are sent more often."""
  asked = options(base)
  asked = dataclasses.replace(asked, prune=dataclasses.replace(
    asked.prune, calibration=dataclasses.replace(asked.prune.calibration, samples=128, length=256, batch=4)
  ))  # fmt: skip
  with described(target, devices) as platform:
    plan = Footprint(asked, LAYER, jnp.bfloat16, platform)
    text, _ = compiled(lambda: getattr(plan, name)())
  often = [x for x in CompiledText(text).collectives() if x.times > 1]
  F, D = LAYER.layers[0].ffn, LAYER.hidden_size
  assert all(x.bytes < 2 * D * F / 2 for x in often), often  # half of an MLP's matrix in bfloat16
  assert any(x.times == 4 for x in often)  # otherwise the loop over micro-batches was not found


# Both targets' kernels of a layer: forward, once more with train.remat, backward.
KERNELS = {
  'h100': ['__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'],
  'tpu-v5p': ['tpu_custom_call'] * 4,  # of which two are backward
}


# Its share of the hidden size is not 256 as well, which would look like a head.
GEMMA = {'layers': (LayerShape(4, 2, 4096, window=512),), 'head_dim': 256, 'hidden_size': 512}


@pytest.mark.parametrize(
  'target,changes',
  [
    ('h100', {'layers': SMALL.layers[:1]}),
    ('tpu-v5p', {'layers': SMALL.layers[:1]}),
    ('h100', GEMMA),
    ('tpu-v5p', GEMMA | {'attention_cap': 50.0}),
  ],
)
def test_attention_is_fused_and_each_device_computes_its_own(target, changes):
  """Rows split over four devices, heads over two: no logits of whole rows, and no heads gathered."""
  layout, T = 'padded' if 'head_dim' in changes else 'packed', 768
  asked = options(adapt, length=T, remat='True', layout=layout)
  sizes = MeshOptions(data=1, fsdp=4, tensor=2)
  with described(target, 8, sizes) as platform:
    layer = dataclasses.replace(SMALL, **changes)
    text, _ = training_step(Footprint(asked, layer, jnp.bfloat16, platform))
  kernels = re.findall(r'custom_call_target="(__cudnn\$\w+|tpu_custom_call)"', text)
  assert sorted(kernels) == KERNELS[target]
  assert not re.search(rf'\[[\d,]*{T},{T}\]', text)
  for sent in CompiledText(text).collectives():  # such as bf16[4,768,4,64]
    assert f'{T},' not in sent.shape or not sent.shape.endswith(f',{layer.head_dim}]')
