"""Pruning methods by their name in `prune.method`: one file each, with one interface (`Method`)."""

from adapt_jax.pruning.methods.adapt import Adapt
from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.methods.flap import Flap
from adapt_jax.pruning.methods.llm_pruner import LlmPruner
from adapt_jax.pruning.methods.magnitude import Magnitude
from adapt_jax.pruning.methods.obs import Obs
from adapt_jax.pruning.methods.shortgpt import ShortGpt
from adapt_jax.pruning.methods.uniform import Uniform
from adapt_jax.pruning.methods.wanda_sp import WandaSp

METHODS: dict[str, type[Method]] = {
  'obs': Obs,
  'adapt': Adapt,
  'uniform': Uniform,
  'llm_pruner': LlmPruner,
  'flap': Flap,
  'wanda_sp': WandaSp,
  'magnitude': Magnitude,
  'shortgpt': ShortGpt,
}
