"""Generates tokens with a model, using a KV cache."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.generation.sampling import GREEDY, Sampling, penalised, sample
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import put_rows
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import kv_cache
from adapt_jax.models.network.backend import loop_options
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import row_shards

State = dict[str, Any]

_PART = 32  # new tokens between two progress updates


@dataclasses.dataclass
class Timings:
  """Seconds and tokens of all calls so far, without padding and fill-up rows.

  The prefill produces a prompt's first new token; decoding produces those after it.
  """

  compile_seconds: float = 0.0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0
  prefill_tokens: int = 0
  decode_tokens: int = 0

  @property
  def prefill_rate(self) -> float:
    """Prompt tokens per second, all rows together; 0 if there were none."""
    return self.prefill_tokens / self.prefill_seconds if self.prefill_tokens else 0.0

  @property
  def decode_rate(self) -> float:
    """New tokens per second after each row's first, all rows together; 0 if there were none."""
    return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class _Prefill:
  """Maps prompts to the decoding state, including each row's first new token."""

  config: ModelConfig
  dtype: Any
  new_tokens: int  # N, the capacity

  def __call__(
    self,
    params: Params,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    rows_B: jax.Array,
    settings: dict[str, jax.Array],
  ) -> State:
    B, P = tokens_BP.shape
    slots = P + self.new_tokens
    logits_BV, cache = kv_cache.prefill(self.config, params, tokens_BP, lengths_B, slots, dtype=self.dtype)
    root = jax.random.key(settings['seed'])
    state = {
      'cache': cache,
      'keys': jax.random.key_data(jax.vmap(lambda row: jax.random.fold_in(root, row))(rows_B)),
      'lengths': lengths_B,
      'new': jnp.zeros((B, self.new_tokens), jnp.int32),
      'counts': jnp.zeros(B, jnp.int32),  # new tokens, the stop id not counted
      'ended': rows_B < 0,  # rows that fill up the batch
      'step': jnp.int32(0),  # new tokens of the longest row, a stop id counted
    }
    if 'repetition_penalty' in settings:
      real_BP = jnp.arange(P) < lengths_B[:, None]
      seen_BV = jnp.zeros(logits_BV.shape, bool)
      state['seen'] = seen_BV.at[jnp.arange(B)[:, None], tokens_BP].max(real_BP)
    return _append(state, logits_BV, settings)


@dataclasses.dataclass(frozen=True)
class _Decode:
  """Decodes until all rows have ended or have `settings['limit']` new tokens; returns the decoding state."""

  config: ModelConfig
  dtype: Any
  padded_length: int  # P

  def __call__(self, params: Params, state: State, settings: dict[str, jax.Array]) -> State:
    params = jax.tree.map(lambda x: x.astype(self.dtype), params)  # once, not at every step

    def going(state: State) -> jax.Array:
      return (state['step'] < settings['limit']) & ~jnp.all(state['ended'])

    def step(state: State) -> State:
      last_B = jax.lax.dynamic_index_in_dim(state['new'], state['step'] - 1, axis=1, keepdims=False)
      logits_BV, cache = kv_cache.decode_step(
        self.config, params, state['cache'], last_B, state['lengths'], self.padded_length,
        state['step'] - 1, dtype=self.dtype,
      )  # fmt: skip
      return _append(state | {'cache': cache}, logits_BV, settings)

    return jax.lax.while_loop(going, step, state)


def _append(state: State, logits_BV: jax.Array, settings: dict[str, jax.Array]) -> State:
  """The state with one more token of every row that has not ended, drawn from its logits."""
  keys_B = jax.random.wrap_key_data(state['keys'])
  keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state['step']))(keys_B)
  seen = {}
  if 'seen' in state:
    logits_BV = penalised(logits_BV, state['seen'], settings['repetition_penalty'])
  tokens_B = sample(logits_BV, keys_B, settings)
  if 'seen' in state:
    seen = {'seen': state['seen'].at[jnp.arange(len(tokens_B)), tokens_B].set(True)}
  ended_B = state['ended'] | settings['stop'][tokens_B]
  return state | {
    'new': jax.lax.dynamic_update_slice_in_dim(state['new'], tokens_B[:, None], state['step'], axis=1),
    'counts': state['counts'] + ~ended_B,
    'ended': ended_B,
    'step': state['step'] + 1,
    **seen,
  }


def bucket(size: int, smallest: int = 16) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96 … that is not below `size`: few lengths need few programs."""
  power = max(smallest, 1 << (size - 1).bit_length())
  between = power * 3 // 4
  return between if power > smallest and size <= between else power


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
  """Checks that prompts have tokens of the model and leave room for the new ones. Raises InputError."""
  room = config.max_position - max_new_tokens
  for i, prompt in enumerate(prompts):
    highest = max(prompt, default=0)
    if not 0 < len(prompt) <= room or highest >= config.vocab_size:
      raise InputError(
        f'prompt {i + 1} has {len(prompt):,} tokens, of ids up to {highest:,}: beside {max_new_tokens:,} new '
        f'ones the context of {config.max_position:,} has room for 1 to {room:,}, of ids below '
        f'{config.vocab_size:,}: change it, or lower the number of new tokens'
      )


class Generator:
  """Continues prompts in batches; compiles a `prefill` and a `decode` once per batch size and buckets.

  Args:
    config: config of the model.
    params: parameters of the model, on the mesh if one is set.
    compiler: counts the programs.
    dtype: dtype of activations, products and the cache.
    max_batch: rows at once, over all devices; at least one per row shard of the mesh.
  """

  def __init__(
    self, config: ModelConfig, params: Params, *, compiler: Compiler, dtype: Any, max_batch: int = 8
  ):
    self.timings = Timings()
    self._config, self._dtype, self._compiler = config, dtype, compiler
    self._params = params
    self._max_batch = max(max_batch // row_shards(), 1) * row_shards()
    self._programs: dict[tuple[int, int, int, bool], tuple[Any, Any]] = {}

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    progress: Progress | None = None,
  ) -> list[list[int]]:
    """New tokens of each prompt, in order, at most `max_new_tokens` and without the stop id that ended it.

    `progress` counts new tokens.

    The tokens drawn for a prompt depend on the seed and its index in `prompts`, not on the other prompts.
    Raises InputError for an empty prompt and for one that is too long.
    """
    check_prompts(self._config, prompts, max_new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
      return found
    stop_V = np.zeros(self._config.vocab_size, bool)
    stop_V[[i for i in stop_ids if 0 <= i < len(stop_V)]] = True
    settings = {
      'temperature': np.float32(sampling.temperature),
      'top_k': np.int32(sampling.top_k),
      'top_p': np.float32(sampling.top_p),
      'seed': np.int32(seed),
      'stop': stop_V,
      'limit': np.int32(max_new_tokens),
    }
    if sampling.repetition_penalty != 1:  # else the programs keep no record of what was seen
      settings['repetition_penalty'] = np.float32(sampling.repetition_penalty)
    shards, count = row_shards(), min(len(prompts), self._max_batch)
    B = min(shards << (-(-count // shards) - 1).bit_length(), self._max_batch)
    # Similar lengths together, and the longest first, so that a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), B):
      rows = order[start : start + B]
      for row, new in zip(rows, self._batch(B, rows, prompts, settings, progress), strict=True):
        found[row] = new
    return found

  def planned_bytes(self) -> int:
    """Bytes on a device while the largest program so far runs, as the compiler reports them.

    The sum of its arguments (with the weights), its temporary memory, and results that replace no argument.
    """
    plans = [program.memory_analysis() for pair in self._programs.values() for program in pair]
    return max(
      (
        m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        for m in plans
      ),
      default=0,
    )

  def _batch(
    self,
    B: int,
    rows: list[int],
    prompts: Sequence[Sequence[int]],
    settings: dict[str, Any],
    progress: Progress | None,
  ) -> list[list[int]]:
    P = bucket(max(len(prompts[row]) for row in rows))
    tokens_BP, lengths_B, rows_B = np.zeros((B, P), np.int32), np.ones(B, np.int32), np.full(B, -1, np.int32)
    for b, row in enumerate(rows):
      tokens_BP[b, : len(prompts[row])] = prompts[row]
      lengths_B[b], rows_B[b] = len(prompts[row]), row
    batch = put_rows(np.arange(B), lambda ids: (tokens_BP[ids], lengths_B[ids], rows_B[ids]))
    prefill, decode = self._compiled(batch, settings)

    start = time.perf_counter()
    state = jax.block_until_ready(prefill(self._params, *batch, settings))
    middle = time.perf_counter()
    for limit in range(1, int(settings['limit']) + 1, _PART):
      part = settings | {'limit': np.int32(min(limit + _PART - 1, settings['limit']))}
      state = jax.block_until_ready(decode(self._params, state, part))
      if progress is not None:
        progress.update(len(rows) * int(part['limit'] - limit + 1))
      if np.asarray(state['ended']).all():
        break
    self.timings.prefill_seconds += middle - start
    self.timings.decode_seconds += time.perf_counter() - middle
    new_BN, counts_B = (np.asarray(state[name])[: len(rows)] for name in ('new', 'counts'))
    made_B = np.minimum(counts_B + 1, int(state['step']))  # including the stop id
    self.timings.prefill_tokens += int(lengths_B[: len(rows)].sum())
    self.timings.decode_tokens += int(made_B.sum()) - len(rows)
    return [new_N[:count].tolist() for new_N, count in zip(new_BN, counts_B, strict=True)]

  def _compiled(self, batch: tuple[jax.Array, ...], settings: dict[str, Any]) -> tuple[Any, Any]:
    B, P = batch[0].shape
    N = bucket(int(settings['limit']))
    key = B, P, N, 'repetition_penalty' in settings
    if key not in self._programs:
      start = time.perf_counter()
      make = _Prefill(self._config, self._dtype, N)
      prefill = self._compiler('prefill', make, self._params, *batch, settings)
      shapes, shardings = jax.eval_shape(make, self._params, *batch, settings), prefill.output_shardings
      state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
      # The cache is updated in place: donated and returned.
      decode = self._compiler(
        'decode', _Decode(self._config, self._dtype, P), self._params, state, settings, donate_argnums=(1,),
        xla_options=loop_options(),
      )  # fmt: skip
      self._programs[key] = prefill, decode
      self.timings.compile_seconds += time.perf_counter() - start
    return self._programs[key]
