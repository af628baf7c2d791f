"""The increase in loss from removing a KV group or MLP channel if the remaining columns compensate for it.

Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992) on o_proj and down_proj. The loss's curvature is
approximated by a Kronecker product: covariance of the layer's inputs ⊗ covariance of the gradients at its
outputs (K-FAC, Martens and Grosse, arXiv 1503.05671; for structured pruning of language models van der
Ouderaa et al., arXiv 2312.17244). The loss is the cross-entropy to ids drawn from the model itself; its
curvature is that of the KL divergence from the dense model, for any ids of the data. With inputs
H = mean c cᵀ [C, C] and gradients G = mean g gᵀ [D, D], setting columns B of a weight W [D, C] to zero and
correcting the others costs tr(G · W_B · ([H⁻¹]_BB)⁻¹ · W_Bᵀ) / 2, here without the half. All in fp32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.network.sharding import constrain
from adapt_jax.pruning.algebra import damped, exact, inverse
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit

# Share of the median diagonal entry that is added to the diagonal. H needs it to be invertible, and because
# it is estimated from few tokens; without it in G, single outputs with large gradients would dominate the
# costs.
DAMPING_INPUTS, DAMPING_GRADIENTS = 0.1, 3.0
# Number of rounds in which channels are removed; those of one round are treated as independent.
ROUNDS = 32


def _start(weight_DC: jax.Array, inputs_CC: jax.Array, groups: int, split: str) -> Any:
  """Weight, inverse, which groups are present, their costs and the highest one, before the first round."""
  inverse_CC = inverse(damped(inputs_CC, DAMPING_INPUTS))
  weight_DC, inverse_CC = constrain(weight_DC, split), constrain(inverse_CC, split)
  return weight_DC, inverse_CC, jnp.ones(groups, bool), jnp.zeros(groups), jnp.zeros(())


def _remove(
  weight_DC: jax.Array, inverse_CC: jax.Array, columns_B: jax.Array, present_B: Any, split: str
) -> tuple[jax.Array, jax.Array]:
  """Weight and inverse after removing the columns and correcting the others, split over devices.

  A column that is no longer `present` is not changed; its row and column of the inverse are zero.
  """
  block_BB = inverse_CC[columns_B][:, columns_B] + jnp.where(present_B, 0.0, 1.0) * jnp.eye(len(columns_B))
  solved_BC = jnp.linalg.solve(block_BB, inverse_CC[columns_B])
  weight_DC -= weight_DC[:, columns_B] @ solved_BC
  inverse_CC -= inverse_CC[:, columns_B] @ solved_BC
  # These are zero up to rounding errors, which would grow.
  weight_DC = weight_DC.at[:, columns_B].set(0.0)
  inverse_CC = inverse_CC.at[columns_B].set(0.0).at[:, columns_B].set(0.0)
  return constrain(weight_DC, split), constrain(inverse_CC, split)


def channel_costs(weight_DF: jax.Array, inputs_FF: jax.Array, gradients_DD: jax.Array) -> jax.Array:
  """Cost of each channel [F] after removing those of lower cost; it never decreases in that order."""
  D, F = weight_DF.shape
  size = -(-F // ROUNDS)
  gradients_DD = constrain(damped(gradients_DD, DAMPING_GRADIENTS), '..')

  def round_(_: int, state: Any) -> Any:
    rows_EF, inverse_FF, present_F, cost_F, floor = state
    now_F = jnp.einsum('df,df->f', rows_EF[:D], rows_EF[D:])
    now_F /= jnp.maximum(jnp.diagonal(inverse_FF), 1e-30)
    lowest_B, columns_B = jax.lax.top_k(jnp.where(present_F, -now_F, -jnp.inf), size)
    present_B = present_F[columns_B]
    raised_B = jnp.where(present_B, jnp.maximum(-lowest_B, floor), cost_F[columns_B])
    # Columns are split over all devices, which multiply them by the gradients without communication; those
    # that the devices do not divide equally are all on every device.
    removed = _remove(rows_EF, inverse_FF, columns_B, present_B, split='.C')
    floor = jnp.maximum(floor, raised_B.max())
    return *removed, present_F.at[columns_B].set(False), cost_F.at[columns_B].set(raised_B), floor

  with exact():
    # A correction of W changes the rows of GW as it does those of W: so no round multiplies by G.
    rows_EF = jnp.concatenate([weight_DF, gradients_DD @ constrain(weight_DF, '.C')])
    start = _start(rows_EF, inputs_FF, F, split='.C')
    return jax.lax.fori_loop(0, -(-F // size), round_, start)[3]


def group_costs(
  weight_DKGH: jax.Array,
  inputs_CC: jax.Array,
  gradients_DD: jax.Array,
  unit: AttentionUnit = KV_GROUPS,
) -> jax.Array:
  """Cost of each KV group [K] in the order of removal, as in `channel_costs`; C = K·G·H columns in all.

  With query heads as the unit, the costs are theirs, [G].
  """
  columns_KB = jnp.asarray(unit.columns(weight_DKGH.shape[1:]))
  K = len(columns_KB)
  gradients_DD = constrain(damped(gradients_DD, DAMPING_GRADIENTS), '..')

  def round_(_: int, state: Any) -> Any:
    weight_DC, inverse_CC, present_K, cost_K, floor = state

    def cost(columns_B: jax.Array, present: jax.Array) -> jax.Array:
      w_DB = weight_DC[:, columns_B]
      block_BB = inverse_CC[columns_B][:, columns_B] + jnp.where(present, 0.0, 1.0) * jnp.eye(len(columns_B))
      return jnp.where(present, jnp.trace(jnp.linalg.solve(block_BB, w_DB.T @ gradients_DD @ w_DB)), jnp.inf)

    now_K = jax.lax.map(lambda xs: cost(*xs), (columns_KB, present_K))
    group = jnp.argmin(now_K)
    floor = jnp.maximum(floor, now_K[group])
    # These are small: every device computes all of them.
    removed = _remove(weight_DC, inverse_CC, columns_KB[group], True, split='..')
    return *removed, present_K.at[group].set(False), cost_K.at[group].set(floor), floor

  start = _start(weight_DKGH.reshape(len(weight_DKGH), -1), inputs_CC, K, split='..')
  with exact():
    return jax.lax.fori_loop(0, K, round_, start)[3]
