"""Every option of a run, declared once: type, default, meaning, range and choices.

`config.prune.target` on the command line is the field `target` of `PruneOptions` here; options that only one
mode reads are in `mode_options.py`. `configs/base.py` and the recipes are views of these declarations,
`build.py` makes and checks the dataclasses, and `rules.py` holds the rules between fields. Below `main.py`
nobody sees a ConfigDict.

A source is a tuple of .txt, .jsonl, .json or .parquet files, directories or globs of them, or a hub data set
`org/name`, `org/name:split` or `org/name:config:split`; on the command line, names separated by commas.
"""

import dataclasses

from adapt_jax.config.declare import ALIGNMENT, COUNT, LENGTH, TOKENS, group, option
from adapt_jax.config.mode_options import (
  BenchOptions,
  CompareOptions,
  GenerateOptions,
  PlanOptions,
  SensitivityOptions,
)
from adapt_jax.config.values import named_texts


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The pretrained model."""

  source: str = option('', 'Hub id, Hugging Face directory, .gguf file, or the workdir of a run.')
  dtype: str = option(
    'auto',
    'Of activations and matrix products; training keeps fp32 master weights. auto is float32 on a CPU, so '
    "that figures do not depend on the CPU's kind (bfloat16 is faster by two fifths where it has AVX-512 "
    'BF16: benchmarks/RESULTS.md), and bfloat16 on accelerators.',
    choices=('auto', 'float32', 'bfloat16'),
  )


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """How the devices of all processes share the work (docs/cluster.md); -1 takes the devices that are left."""

  data: int = option(1, 'Devices that share the rows of a batch, each with all weights.', result=False)
  fsdp: int = option(
    -1, 'Devices that share the weights, the optimizer state and the rows of a batch.', result=False
  )
  tensor: int = option(
    1,
    'Devices that share KV groups, MLP channels and vocabulary; pruning then keeps widths that this divides.',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """How texts are read."""

  text_field: str = option('text', 'Field of .jsonl, .json, .parquet and hub rows that holds a text.')
  messages_field: str = option(
    'messages', "Field that holds a chat; training then predicts the assistant's tokens only."
  )
  chat_template: str = option(
    '', "Empty: the tokenizer's own. plain (User: ... Assistant: ...) or a Jinja file for models without one."
  )
  cache: str = option(
    '',
    'Directory of tokenised training data, which may be deleted at any time. Empty: adapt-jax/tokens in '
    '$XDG_CACHE_HOME or ~/.cache.',
    result=False,
  )


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
  """The rows that scores and least squares are computed on."""

  source: tuple[str, ...] = option(
    (),
    'Text of the kinds that the model shall stay good at; rows come from the first 4 million tokens. self: '
    'rows that the dense model writes, samples of them in all.',
  )
  weights: tuple[float, ...] = option(
    (),
    'For each entry of source its share of the rows. Empty: the entries one after another, of which the '
    'first 4 million tokens count.',
  )
  samples: int = option(32, 'Rows, drawn afresh at every pruning step (the paper: 512).', within=COUNT)
  length: int = option(
    1024, 'Tokens of a row, best as long as the texts to come (the paper: 64).', within=LENGTH
  )
  batch: int = option(4, 'Rows that pass a layer at once on a device, at most.', within=COUNT, result=False)


# Methods that follow the paper's schedule step by step; the authors' program has these two.
PROGRESSIVE = ('adapt', 'uniform')


@dataclasses.dataclass(frozen=True)
class PruneOptions:
  """What is removed, and how the remaining weights are adjusted (docs/methods.md)."""

  method: str = option(
    'obs',
    'obs removes, in one shot a stage, the groups whose removal costs the loss least per parameter. adapt is '
    "Adapt-Pruner, the paper's: layers lose by their importance, step by step. uniform is the same schedule "
    'with all layers alike. The others are rivals, in one shot a stage; slicegpt narrows the residual stream '
    'in place of the layers, and cannot be trained or adjusted after.',
    choices=(
      'obs', 'adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'magnitude', 'shortgpt', 'slicegpt',
    ),
  )  # fmt: skip
  compensate: str = option(
    'least_squares',
    'How the remaining weights make up for what is removed, without training. least_squares solves o_proj '
    "and down_proj anew on the calibration rows; bias adds biases to them (FLAP's way).",
    choices=('none', 'least_squares', 'bias'),
  )
  target: float = option(0.8, 'Fraction of the parameters to keep (up to 1), or their number (above 1).')
  stages: int = option(1, "Rounds of pruning and recovery (the paper's N).", within=(1, 10_000))
  stage_targets: str = option(
    'linear', 'How parameters fall from stage to stage.', choices=('linear', 'geometric')
  )
  steps: int = option(
    50,
    'T of adapt and uniform: steps that would remove everything at ratio 1.',
    within=(1, 1_000_000),
  )
  ratio: float = option(
    1.0,
    'rho of adapt and uniform: overall sparsity at step T; pruning stops at the target before.',
    within=(1e-6, 1),
  )
  amplitude: float = option(
    0.02, "A of adapt: how far a layer's importance bends its sparsity at each step.", within=(0, 1)
  )
  importance: str = option(
    'taylor',
    'Score of a group, for adapt and uniform; the other methods have their own.',
    choices=(
      'taylor', 'taylor_vectorize', 'taylor_second', 'taylor_mix', 'l1', 'l2', 'fluctuation', 'wanda',
      'curvature', 'random',
    ),
  )  # fmt: skip
  layer_distance: str = option(
    'cosine',
    "Between a layer's input and output: its importance for adapt. Other methods only report it (shortgpt: "
    'always cosine).',
    choices=('cosine', 'euclidean', 'manhattan'),
  )
  align_kv: int = option(
    1, 'A layer keeps a multiple of so many KV heads, or all that it has.', within=ALIGNMENT
  )
  align_ffn: int = option(
    1,
    'A layer keeps a multiple of so many MLP channels, or all; 64 to 256 suit tensor cores and quantisation.',
    within=ALIGNMENT,
  )
  serve: str = option(
    'any',
    'The program that will run the result (docs/serving.md). gguf keeps multiples of 32 MLP channels for the '
    'quantised types of llama.cpp (set align_ffn = 256 for K-quants). tensor_parallel=n keeps KV heads and '
    'MLP channels that n devices can share.',
  )
  compat: str = option(
    '',
    "reference repeats the errors of the authors' program, to compare with it: for adapt and uniform, with "
    'compensate = none.',
    choices=('', 'reference'),
  )
  calibration: CalibrationOptions = group(CalibrationOptions)


@dataclasses.dataclass(frozen=True)
class DistillOptions:
  """Distillation from the dense model: the loss is alpha * KL + (1 - alpha) * cross-entropy."""

  alpha: float = option(
    1.0, 'Weight of the distillation; 0 is cross-entropy alone, without a teacher.', within=(0, 1)
  )
  temperature: float = option(1.0, 'Divides the logits of teacher and student.', within=(1e-3, 1e3))
  cache: int = option(
    0,
    "Keeps so many of the teacher's likeliest ids for each token in the workdir, computed before anything "
    'else, for a teacher that does not fit beside the student. 0: the teacher computes as it is needed.',
    within=(0, 4096),
  )

  @property
  def teacher_beside(self) -> bool:
    """Whether the teacher computes beside the student."""
    return self.alpha > 0 and not self.cache

  @property
  def kept_ids(self) -> int:
    """How many of the teacher's ids are kept for each token; 0 where none are."""
    return self.cache if self.alpha > 0 else 0


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Recovery training."""

  source: tuple[str, ...] = option((), 'Texts or chats. self: rows that the dense model writes.')
  weights: tuple[float, ...] = option(
    (),
    'For each entry of source its share of the rows; small sources repeat. Empty: the entries one after '
    'another, of which the first max(tokens, 4 million) tokens are shuffled.',
  )
  layout: str = option(
    'packed',
    'packed: documents end to end in rows; they do not attend to each other. padded: one document a row, '
    'truncated or filled up, as the paper did.',
    choices=('packed', 'padded'),
  )
  tokens: int = option(
    0, 'Over all stages, padding included; 0 only where nothing is trained (--mode=prune).', within=TOKENS
  )
  batch: int = option(128, 'Rows of an optimizer step.', within=COUNT)
  micro_batch: int = option(
    8, 'Rows at once on a device, at most; gradients accumulate.', within=COUNT, result=False
  )
  length: int = option(1024, 'Tokens of a row.', within=LENGTH)
  lr: float = option(1e-4, 'Highest learning rate (the paper: 2e-5).', within=(0, 1))
  min_lr: float = option(1e-5, 'Learning rate at the end of the schedule.', within=(0, 1))
  schedule: str = option(
    'wsd', 'Of the learning rate: warmup-stable-decay, or cosine.', choices=('wsd', 'cosine')
  )
  warmup: float = option(0.05, 'Fraction of all steps in which the learning rate rises.', within=(0, 1))
  clip: float = option(1.0, 'Largest global norm of the gradient.', within=(1e-12, 1e12))
  split: str = option(
    'linear',
    'Tokens by stage; linear gives later stages more.',
    choices=('linear', 'constant', 'cosine'),
  )
  optimizer_state: str = option(
    'carry',
    'Whether pruning keeps the moments of the weights that remain.',
    choices=('carry', 'reset'),
  )
  mu_dtype: str = option(
    'float32',
    "Of Adam's first moment; bfloat16 saves two bytes a weight.",
    choices=('float32', 'bfloat16'),
  )
  remat: bool = option(
    False,
    'Whether the backward pass computes each layer again: less memory, slower by a tenth (CPU) to a third. '
    'Otherwise it computes all but the products with weights again.',
    result=False,
  )
  save_every: int = option(
    500, 'Steps between checkpoints; the end of a stage is always saved.', within=COUNT, result=False
  )
  distill: DistillOptions = group(DistillOptions)


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """What is measured of the dense, the pruned and the recovered model (docs/evaluation.md)."""

  source: tuple[str, ...] = option(
    (),
    'Held-out texts for perplexity. NAME=SOURCE names one, such as web=pages.jsonl,wiki=articles.txt: each '
    'name is measured apart. Entries without a name are one text together.',
  )
  length: int = option(1024, 'Tokens of a window; windows do not overlap.', within=LENGTH)
  batch: int = option(4, 'Windows at once on a device.', within=COUNT, result=False)
  max_tokens: int = option(
    0, 'Tokens of each text at most, in windows spread evenly over it; 0: all.', within=TOKENS
  )
  tasks: tuple[str, ...] = option(
    (), 'Tasks, groups and tags of lm-evaluation-harness, which the extra eval installs.'
  )
  suite: str = option('', "paper: the paper's whole protocol, besides tasks.", choices=('', 'paper'))
  tasks_path: str = option('', 'Directory with task files (YAML) of your own.')
  fewshot: int = option(
    -1, 'Examples before each question of tasks; -1: as the task says.', within=(-1, 1000)
  )
  limit: int = option(0, 'Questions of each task, the first ones; 0: all.', within=(0, 10**9))

  @property
  def texts(self) -> dict[str, tuple[str, ...]]:
    """The sources of each text by its name."""
    return named_texts(self.source)

  @property
  def has_tasks(self) -> bool:
    """Whether lm-evaluation-harness has work."""
    return bool(self.tasks or self.suite)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """The forms of the result, a directory of the workdir each (docs/serving.md)."""

  formats: tuple[str, ...] = option(
    ('hf',),
    'hf: transformers, vLLM, MLX-LM. hf_padded: zeros up to the widest layer, for programs that know stock '
    'classes only. gguf: llama.cpp.',
    choices=('hf', 'hf_padded', 'gguf'),
    result=False,
  )
  dtype: str = option(
    'auto',
    'Of the weights; auto: as in the source.',
    choices=('auto', 'float32', 'bfloat16', 'float16'),
  )
  gguf_types: tuple[str, ...] = option(
    ('auto',),
    'A GGUF file each; auto: as dtype.',
    choices=('auto', 'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0'),
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
  sensitivity: SensitivityOptions = group(SensitivityOptions)
  compare: CompareOptions = group(CompareOptions)
  plan: PlanOptions = group(PlanOptions)
  generate: GenerateOptions = group(GenerateOptions)
  bench: BenchOptions = group(BenchOptions)
  export: ExportOptions = group(ExportOptions)
  seed: int = option(
    0, 'Of calibration draws, data order and everything else that is random.', within=(0, 2**31 - 1)
  )
  tracker: tuple[str, ...] = option(
    (),
    'Programs that also get the curves of metrics.jsonl: tensorboard (event files in the workdir), wandb '
    "(Weights & Biases, with that program's own environment variables). Each is an extra of the package.",
    choices=('', 'tensorboard', 'wandb'),
    result=False,
  )
