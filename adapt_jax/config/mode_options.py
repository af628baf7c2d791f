"""Options that a single mode reads: sensitivity, compare, plan, generate, bench."""

import dataclasses
from typing import Any

from adapt_jax.config.declare import COUNT, LENGTH, MAX_SPARSITY, option


@dataclasses.dataclass(frozen=True)
class SensitivityOptions:
  """Mode sensitivity: perplexity when one layer alone is pruned, for every layer (paper Fig. 1)."""

  sparsity: float = option(
    0.5,
    'Of the one layer. Whole KV groups go, rounded down: of 3 groups at 0.5 one goes. The MLP keeps '
    'floor(channels * (1 - sparsity)), rounded up to prune.align_ffn. The last group and channel stay.',
    within=(1e-6, MAX_SPARSITY),
  )
  bases: tuple[float, ...] = option(
    (0.0, 0.2, 0.4),
    'A curve each: the sparsity of every layer of the model that is started from; 0 is the dense model.',
    within=(0, MAX_SPARSITY),
  )
  blocks: tuple[str, ...] = option(
    ('both',), 'What is pruned of the layer, a curve each.', choices=('both', 'attention', 'mlp')
  )


@dataclasses.dataclass(frozen=True)
class CompareOptions:
  """Mode compare: a grid over any fields but model.source, each cell a run of its own."""

  grid: tuple[dict[str, Any], ...] = option(
    (),
    "Groups {'prune.method': ('adapt', 'flap'), 'prune.target': (0.9, 0.8)}: all combinations of each, none "
    'twice. A field that a group does not name keeps its value.',
    result=False,
  )
  recover: bool = option(False, 'Whether cells are trained as train.* says; otherwise they are only pruned.')
  x: str = option('prune.target', "The field along the plots' x axis.", result=False)
  over: str = option(
    'seed', 'The field whose values are repetitions: tables and plots show median and range.', result=False
  )


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Mode plan: memory, arithmetic and time of a run, from shapes alone (docs/cluster.md)."""

  devices: int = option(
    8, 'Simulated devices, as config.mesh splits them; 0: the devices at hand.', within=(0, 65_536)
  )
  device_memory_gb: float = option(80.0, 'Of each device, in 10^9 bytes.', within=(1e-3, 1e6))
  peak_tflops: float = option(
    989.0, 'Of each device, in the dtype of the products (H100, bfloat16).', within=(1e-6, 1e9)
  )
  depths: tuple[int, ...] = option(
    (), 'Two numbers of layers to compile and to extrapolate from, where all layers take long.'
  )


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
  """Mode generate: model.source continues each --prompt."""

  max_new_tokens: int = option(128, 'Tokens of an answer, at most.', within=(1, 10**7))
  temperature: float = option(
    0.0, '0: always the likeliest token. Otherwise tokens are drawn, seeded by config.seed.', within=(0, 1e3)
  )
  top_k: int = option(0, 'Draw among so many likeliest tokens only; 0: all.', within=(0, 10**9))
  top_p: float = option(
    1.0, 'Draw among the likeliest tokens that together have this probability.', within=(1e-6, 1)
  )
  batch: int = option(8, 'Prompts at once, over all devices.', within=COUNT)
  chat: bool = option(
    True,
    "Whether a prompt is a user's message in the chat template, where there is one; otherwise it is text to "
    'continue.',
  )
  dense: str = option('', 'A second model beside model.source, such as the one before pruning.')


@dataclasses.dataclass(frozen=True)
class BenchOptions:
  """Mode bench: speed, memory and size of model.source beside those of a dense model."""

  dense: str = option('', 'The model before pruning. Empty: the one that model.source says it came from.')
  prompt_length: int = option(512, 'Tokens of a prompt, random ids.', within=(1, 10**7))
  new_tokens: int = option(64, 'Tokens decoded after each prompt.', within=LENGTH)
  batch: int = option(1, 'Prompts at once, over all devices.', within=COUNT)
  repeats: int = option(5, 'Runs of each model, in turn.', within=(1, 10**6))
