"""Pruning methods by the name that `config.prune.method` gives: one file each, one interface (`Method`)."""

from adapt_jax.methods.adapt import Adapt
from adapt_jax.methods.base import Method
from adapt_jax.methods.flap import Flap
from adapt_jax.methods.llm_pruner import LlmPruner
from adapt_jax.methods.magnitude import Magnitude
from adapt_jax.methods.obs import Obs
from adapt_jax.methods.shortgpt import ShortGpt
from adapt_jax.methods.uniform import Uniform
from adapt_jax.methods.wanda_sp import WandaSp

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
