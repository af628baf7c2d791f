"""Every option of a run, declared once: type, default, meaning, range and choices.

`prune.target` on the command line is the field `target` of `PruneOptions`. Those of pruning are in
`prune_options.py`, and those that only one mode reads in `mode_options.py`. `configs/base.py` and the recipes
are based on these declarations, `build.py` creates and checks the dataclasses, and `rules.py` checks rules
that involve several fields. Only the command line uses ConfigDict.

A source is a tuple of .txt, .jsonl, .json or .parquet files, directories or globs of such files, or hub data
sets `org/name`, `org/name:split` or `org/name:config:split`; on the command line, separated by commas.
"""

import dataclasses
from typing import Any

from adapt_jax.config.declare import COUNT, LENGTH, TOKENS, group, option
from adapt_jax.config.mode_options import (
  BenchOptions,
  CompareOptions,
  EstimateOptions,
  FrontierOptions,
  GenerateOptions,
  NarrowOptions,
  SensitivityOptions,
)
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.values import GGUF_TYPES, named_texts


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The pretrained model."""

  source: str = option('', 'Hub id, Hugging Face directory, .gguf file, or the workdir of a run.')
  dtype: str = option(
    'auto',
    'Dtype of activations and matrix products, except in training (train.dtype). auto: bfloat16 on '
    'accelerators and float32 on CPUs, so that results do not depend on the kind of CPU.',
    choices=('auto', 'float32', 'bfloat16'),
  )


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """How the devices of all processes split the work (docs/cluster.md); -1: all remaining devices."""

  data: int = option(1, 'Devices that split the rows of a batch; each holds all weights.', result=False)
  fsdp: int = option(
    -1,
    'Devices that split the weights, the optimizer state and the rows of a batch; -1: all that remain.',
    result=False,
  )
  tensor: int = option(
    1,
    'Devices that split KV groups, MLP channels and the vocabulary; pruning keeps widths divisible by it.',
    result=False,
  )
  platform: str = option(
    '',
    'What the devices must be: if JAX finds others, the run ends before any work. JAX falls back to the CPU '
    'where it finds no driver. Empty: any.',
    choices=('', 'cpu', 'cuda', 'tpu'),
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How data is read."""

  text_field: str = option('text', 'Field with the text, in .jsonl, .json, .parquet and hub rows.')
  messages_field: str = option(
    'messages', "Field with the messages of a chat; training predicts only the assistant's tokens."
  )
  chat_template: str = option(
    '',
    "Chat template: plain (User: ... Assistant: ...), paper (ChatML as in the paper's runs) or a Jinja file. "
    "Empty: the tokenizer's own.",
  )
  cache: str = option(
    '',
    'Directory for tokenised texts and rows that models generate; it may be deleted at any time, but other '
    'machines may generate other rows, with which a run does not continue. Empty: adapt-jax/tokens in '
    '$XDG_CACHE_HOME or ~/.cache.',
    result=False,
  )

  @property
  def fields(self) -> dict[str, Any]:
    """The names of the fields of rows, as arguments of what reads them."""
    return {'text_field': self.text_field, 'messages_field': self.messages_field}


@dataclasses.dataclass(frozen=True)
class DistillOptions:
  """Distillation from a teacher: the loss is alpha * KL + (1 - alpha) * cross-entropy."""

  source: str = option(
    '',
    'The teacher: a hub id, a directory, a .gguf file or a workdir, as for model.source, with the same '
    'vocabulary. Empty: the dense model of the run. Mode recover needs it.',
  )
  alpha: float = option(
    0.5,
    'Weight of the KL divergence from the teacher; the rest is for cross-entropy on the text. 1: only the '
    'divergence. 0: only cross-entropy, without a teacher.',
    within=(0, 1),
  )
  cache: int = option(
    0,
    "How many of the teacher's most likely ids to save for each token in the workdir, before pruning starts, "
    'if teacher and student do not fit in memory together. 0: the teacher runs during training.',
    within=(0, 4096),
  )

  @property
  def teacher_beside(self) -> bool:
    """Whether the teacher runs during training, in memory together with the student."""
    return self.alpha > 0 and not self.cache

  @property
  def kept_ids(self) -> int:
    """How many of the teacher's ids are saved for each token; 0 if none are."""
    return self.cache if self.alpha > 0 else 0


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Recovery training."""

  source: tuple[str, ...] = option(
    (), 'Texts or chats. self: the dense model, or the teacher of mode recover, generates the rows.'
  )
  weights: tuple[float, ...] = option(
    (),
    'Share of the rows for each entry of source; small sources repeat. Empty: the entries are concatenated, '
    'and their first max(tokens, 4 million) tokens are shuffled.',
  )
  layout: str = option(
    'packed',
    'packed: documents are concatenated into rows and do not attend to each other. padded: one document per '
    'row, truncated or padded, as in the paper.',
    choices=('packed', 'padded'),
  )
  tokens: int = option(
    0,
    'Tokens of all stages, including padding, rounded down to whole batches of batch * length; 0 only if '
    'nothing is trained (--mode=prune).',
    within=TOKENS,
  )
  batch: int = option(128, 'Rows per optimizer step.', within=COUNT)
  micro_batch: int = option(
    0,
    'Maximum rows per device at once; gradients are accumulated. 0: on accelerators as many as fit, up to '
    "32,768 tokens, by the compiler's plan of each stage; 8 on CPUs.",
    within=(0, 10**9),
    result=False,
  )
  length: int = option(1024, 'Tokens per row.', within=LENGTH)
  lr: float = option(
    -1.0,
    'Peak learning rate (2e-5 in the paper). -1: in proportion to the weights of the model (docs/texts.md).',
    within=(-1, 1),
  )
  min_lr: float = option(
    -1.0, 'Learning rate at the end of the schedule; -1: a tenth of the peak.', within=(-1, 1)
  )
  schedule: str = option(
    'wsd', 'Learning rate schedule: warmup-stable-decay or cosine.', choices=('wsd', 'cosine')
  )
  warmup: float = option(0.05, 'Fraction of all steps during which the learning rate rises.', within=(0, 1))
  clip: float = option(1.0, 'Maximum global norm of the gradient.', within=(1e-12, 1e12))
  dtype: str = option(
    'auto',
    'Dtype of activations and matrix products in training, of the student and the teacher; weights are fp32. '
    'auto: model.dtype if that is set; otherwise bfloat16 on accelerators, and on CPUs where a product in '
    'bfloat16 is at least 1.25 times as fast. The run measures it once, before it begins, and keeps to it.',
    choices=('auto', 'float32', 'bfloat16'),
  )
  moments_dtype: str = option(
    'float32',
    "Dtype of Adam's two moments; bfloat16 saves four bytes per weight.",
    choices=('float32', 'bfloat16'),
  )
  remat: str = option(
    'auto',
    'Whether the backward pass recomputes each layer entirely: less memory, slower by a tenth (CPU) to a '
    'third. Otherwise it recomputes all but the products with weights. auto: in those stages whose step '
    "would not fit the accelerator's memory without, by the compiler's plan; never on CPUs.",
    choices=('auto', 'True', 'False'),
    result=False,
  )
  save_every: int = option(
    500, 'Steps between checkpoints; the end of a stage is always saved.', within=COUNT, result=False
  )
  distill: DistillOptions = group(DistillOptions)

  @property
  def at_once(self) -> int:
    """`micro_batch`, or 8 if it is 0 and the memory of the devices is not known."""
    return self.micro_batch or 8

  @property
  def end_lr(self) -> float:
    """`min_lr`, or a tenth of `lr` if it is -1."""
    return self.min_lr if self.min_lr >= 0 else self.lr / 10


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """What is measured on the dense, pruned and recovered models (docs/evaluation.md)."""

  source: tuple[str, ...] = option(
    (),
    'Held-out texts for perplexity. NAME=SOURCE names a text, as in web=pages.jsonl,wiki=articles.txt; each '
    'name is measured separately. Entries without a name form one text.',
  )
  length: int = option(1024, 'Tokens per window; windows do not overlap.', within=LENGTH)
  batch: int = option(4, 'Windows per device at once.', within=COUNT, result=False)
  max_tokens: int = option(
    32_768,
    'Maximum tokens of each text, in windows spread evenly over its first 4 million tokens, or over the '
    'first max_tokens if that is more; 0: all.',
    within=TOKENS,
  )
  health: bool = option(
    True,
    'Whether reports say if the model still answers: questions, repetition, and perplexity on text that the '
    'dense model generates (docs/evaluation.md). Cells of mode compare have it only if the grid names it.',
    result=False,
  )
  tasks: tuple[str, ...] = option(
    (), 'Tasks, groups and tags of lm-evaluation-harness, which is installed by the extra eval.'
  )
  suite: str = option('', "paper: the paper's full protocol, in addition to tasks.", choices=('', 'paper'))
  tasks_path: str = option('', 'Directory with your own task files (YAML).')
  limit: int = option(0, 'Use only the first questions of each task, this many; 0: all.', within=(0, 10**9))

  @property
  def texts(self) -> dict[str, tuple[str, ...]]:
    """The sources of each text by its name."""
    return named_texts(self.source)

  @property
  def has_tasks(self) -> bool:
    """Whether tasks are evaluated with lm-evaluation-harness."""
    return bool(self.tasks or self.suite)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """The formats of the result, each in a directory of the workdir (docs/serving.md)."""

  formats: tuple[str, ...] = option(
    ('hf',),
    'hf: transformers, vLLM, MLX-LM. hf_padded: layers padded with zeros to equal widths, for programs that '
    'support only stock classes. gguf: llama.cpp. gguf_padded: llama.cpp, layers padded likewise, for builds '
    'and families that need equal widths.',
    choices=('hf', 'hf_padded', 'gguf', 'gguf_padded'),
    result=False,
  )
  dtype: str = option(
    'auto',
    'Dtype of the weights; auto: as in the source, and bfloat16 if that is a quantised GGUF file.',
    choices=('auto', 'float32', 'bfloat16', 'float16'),
  )
  gguf_types: tuple[str, ...] = option(
    ('auto',),
    'Tensor types, each a GGUF file; auto: as dtype. Q4_K_M, Q5_K_M and Q6_K are made by llama.cpp, which is '
    'installed by the extra quantise (docs/serving.md).',
    choices=('auto', *GGUF_TYPES),
    result=False,
  )
  push: str = option(
    '',
    'Hub repository org/name to upload the formats to: hf to org/name, hf_padded to org/name-padded, gguf to '
    'org/name-GGUF, gguf_padded to org/name-padded-GGUF. Missing ones are created when the run '
    'starts, which needs a token that may write (hf auth login, or HF_TOKEN).',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Everything that a run depends on; equal options and equal files give equal bits."""

  model: ModelOptions = group(ModelOptions)
  mesh: MeshOptions = group(MeshOptions)
  data: DataOptions = group(DataOptions)
  prune: PruneOptions = group(PruneOptions)
  train: TrainOptions = group(TrainOptions)
  evaluate: EvaluateOptions = group(EvaluateOptions)
  narrow: NarrowOptions = group(NarrowOptions)
  sensitivity: SensitivityOptions = group(SensitivityOptions)
  compare: CompareOptions = group(CompareOptions)
  estimate: EstimateOptions = group(EstimateOptions)
  generate: GenerateOptions = group(GenerateOptions)
  bench: BenchOptions = group(BenchOptions)
  frontier: FrontierOptions = group(FrontierOptions)
  export: ExportOptions = group(ExportOptions)
  seed: int = option(
    0, 'Random seed of calibration draws, data order and everything else.', within=(0, 2**31 - 1)
  )
  tracker: tuple[str, ...] = option(
    (),
    'Trackers that also receive the curves of metrics.jsonl: tensorboard (event files in the workdir), wandb '
    '(Weights & Biases, configured by its environment variables). Each needs the extra of the same name.',
    choices=('', 'tensorboard', 'wandb'),
    result=False,
  )

  @property
  def training_dtype(self) -> str:
    """`train.dtype`, or `model.dtype` if it is auto."""
    return self.model.dtype if self.train.dtype == 'auto' else self.train.dtype
