"""Options that a single mode reads: sensitivity, compare, estimate, generate, bench, frontier."""

import dataclasses
from typing import Any

from adapt_jax.config.declare import COUNT, LENGTH, MAX_SPARSITY, option
from adapt_jax.config.values import GGUF_TYPES


@dataclasses.dataclass(frozen=True)
class SensitivityOptions:
  """Mode sensitivity: perplexity when one layer alone is pruned, for every layer (paper Fig. 1)."""

  sparsity: float = option(
    0.5,
    'Sparsity of the pruned layer. Whole KV groups are removed, rounded down: 1 of 3 at 0.5. The MLP keeps '
    'floor(channels * (1 - sparsity)), rounded up to prune.align_ffn. One group and channel always remain.',
    within=(1e-6, MAX_SPARSITY),
  )
  bases: tuple[float, ...] = option(
    (0.0, 0.2, 0.4),
    'Sparsities of the starting model, equal in all layers; 0 is the dense model. Each gives a curve.',
    within=(0, MAX_SPARSITY),
  )


@dataclasses.dataclass(frozen=True)
class NarrowOptions:
  """Mode narrow: a smaller hidden size, the same in all layers (docs/hidden-size.md)."""

  hidden: int = option(
    0, 'Hidden size of the result; it must be set, and be smaller than in the model.', within=(0, 2**18)
  )


@dataclasses.dataclass(frozen=True)
class CompareOptions:
  """Mode compare: a grid over any options except model.source; each cell is a run of its own."""

  grid: tuple[dict[str, Any], ...] = option(
    (),
    "Groups such as {'prune.method': ('adapt', 'flap'), 'prune.target': (0.9, 0.8)}: all combinations of "
    'each group, without duplicates. Options that a group does not name keep their values.',
    result=False,
  )
  recover: bool = option(
    False, 'Whether cells are also trained, as set in train; otherwise they are only pruned.'
  )
  over: str = option(
    'seed',
    'The option whose values are repetitions: tables and plots show their median and range.',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class EstimateOptions:
  """Mode estimate: memory, traffic, time and cost of a run, from shapes alone (docs/cluster.md)."""

  target: str = option(
    'cpu',
    'The accelerator to compile for, if the extra estimate is installed. cpu: simulated CPU devices; their '
    'times are estimated for an H100, or measured if devices = 0.',
    choices=('cpu', 'h100', 'h200', 'a100', 'tpu-v5e', 'tpu-v5p', 'tpu-v6e'),
  )
  devices: int = option(
    8,
    'Number of devices, arranged by config.mesh; 0, with target cpu: those of this machine.',
    within=(0, 65_536),
  )
  price: float = option(
    0.0, 'Price of a device for an hour, in any currency; 0: the cost is not shown.', within=(0, 1e9)
  )


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
  """Mode generate: model.source continues each --prompt."""

  max_new_tokens: int = option(128, 'Maximum number of new tokens per prompt.', within=(1, 10**7))
  temperature: float = option(
    0.0, '0: always the most likely token. Otherwise tokens are sampled, seeded by seed.', within=(0, 1e3)
  )
  chat: bool = option(
    True,
    'Whether to render each prompt with the chat template, if there is one, as a user message; otherwise it '
    'is continued as plain text.',
  )


@dataclasses.dataclass(frozen=True)
class BenchOptions:
  """Mode bench: speed, memory and size of model.source, compared with a dense model."""

  dense: str = option('', 'The model before pruning. Empty: the one recorded in model.source.')
  prompt_length: int = option(512, 'Tokens per prompt; they are random ids.', within=(1, 10**7))
  new_tokens: int = option(64, 'Tokens decoded after each prompt.', within=LENGTH)
  batch: int = option(1, 'Prompts at once, over all devices.', within=COUNT)
  repeats: int = option(5, 'Runs of each model; the models alternate.', within=(1, 10**6))


@dataclasses.dataclass(frozen=True)
class FrontierOptions:
  """Mode frontier: size, quality and speed of several models and types of GGUF files (docs/which-size.md)."""

  models: tuple[str, ...] = option(
    (),
    'Smaller models with the same tokens, to compare with model.source, the dense one: workdirs of runs (of '
    'several sizes: all of them), directories, .gguf files or hub ids.',
    result=False,
  )
  types: tuple[str, ...] = option(
    ('bf16', 'q8_0', 'q4_k_m'),
    'Types of GGUF files; each model is written and measured in each. The dense model is always measured in '
    'bf16 too, with which all others are compared.',
    choices=tuple(kind.lower() for kind in GGUF_TYPES),
    result=False,
  )
  threads: int = option(
    0,
    'CPU threads of llama.cpp; 0: as many as the CPUs that the process may use.',
    within=(0, 4096),
    result=False,
  )
