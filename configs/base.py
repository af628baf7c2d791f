"""Every field of a run with its default; recipes start from `get_config()` and set what differs.

    python main.py --config=configs/base.py --workdir=out/run \
        --config.model.source=HuggingFaceTB/SmolLM2-135M \
        --config.prune.calibration.source=calibration.txt \
        --config.train.source=corpus.jsonl --config.train.tokens=10_000_000 \
        --config.evaluate.source=heldout.txt

A source is a tuple of .txt, .jsonl or .parquet files, directories or globs of them, or a hub data set
`org/name`, `org/name:split` or `org/name:config:split`; on the command line, names separated by commas.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The defaults: obs with least squares (the paper's: configs/adapt.py); model and data the recipe names."""
  config = ConfigDict()
  config.seed = 0  # of calibration draws, data order and everything else that is random

  config.model = ConfigDict()
  config.model.source = ''  # hub id, Hugging Face directory, or .gguf file
  # Of activations and matrix products (training keeps fp32 master weights): float32, bfloat16, or
  # auto: float32 on CPU, where it measures faster, bfloat16 on accelerators.
  config.model.dtype = 'auto'

  config.data = ConfigDict()
  config.data.text_field = 'text'  # of .jsonl, .parquet and hub rows
  config.data.messages_field = 'messages'  # rows that have it are chats: loss on the assistant's tokens

  config.prune = ConfigDict()
  # obs: what costs the loss least per parameter goes, in one shot a stage. adapt: Adapt-Pruner, the paper's:
  # layers lose by their importance, step by step. uniform: the same schedule, all layers alike.
  # Rivals, in one shot a stage (docs/methods.md): llm_pruner, flap, wanda_sp, magnitude, shortgpt.
  config.prune.method = 'obs'
  # What stays takes over from what went, without training. least_squares: o_proj and down_proj are solved
  # anew on the calibration rows. bias: they get biases (FLAP's way). none.
  config.prune.compensate = 'least_squares'
  config.prune.target = 0.8  # fraction of the parameters kept (<= 1), or a parameter count (> 1)
  config.prune.stages = 1  # prune-then-recover rounds (N of the paper)
  config.prune.stage_targets = 'linear'  # linear or geometric in parameters
  # Fields from here to importance are of adapt and uniform; the other methods ignore them.
  config.prune.steps = 50  # T: steps that would remove everything at ratio 1; sets the step size
  config.prune.ratio = 1.0  # rho: overall sparsity at step T; pruning stops at the target before
  config.prune.amplitude = 0.02  # A: how far layer importance bends a layer's sparsity per step
  # Score of a group: taylor, taylor_vectorize, taylor_second, taylor_mix, l1, l2, fluctuation, wanda,
  # curvature, random.
  config.prune.importance = 'taylor'
  # Between a layer's input and output: cosine, euclidean, manhattan. Decides in adapt; else only reported
  # (shortgpt: always cosine).
  config.prune.layer_distance = 'cosine'
  config.prune.align_ffn = (
    1  # MLP widths are multiples of this (64 to 256 suit tensor cores and quantisation)
  )
  # 'reference': with the errors of the authors' program, to compare with it; adapt and uniform only,
  # compensate 'none'.
  config.prune.compat = ''
  config.prune.calibration = ConfigDict()
  # Text of the kind that the model shall stay good at; its first 4 million tokens are drawn from.
  config.prune.calibration.source = ()
  config.prune.calibration.samples = 32  # rows drawn afresh at every pruning step (the paper: 512)
  config.prune.calibration.length = 1024  # tokens of a row: as long as the text to come (the paper: 64)
  config.prune.calibration.batch = 4  # rows that pass a layer at once: memory only, not the result

  config.train = ConfigDict()
  config.train.source = ()  # recovery text or chats
  config.train.tokens = 0  # over all stages; 0 prunes without recovery
  config.train.batch = 128  # rows per optimizer step
  config.train.micro_batch = 8  # rows at once (gradients accumulate); divides batch
  config.train.length = 1024  # tokens of a row
  config.train.lr = 2e-5  # peak learning rate
  config.train.min_lr = 2e-6  # at the end of the schedule
  config.train.schedule = 'wsd'  # warmup-stable-decay, or cosine
  config.train.warmup = 0.05  # fraction of all steps
  config.train.clip = 1.0  # global gradient norm
  config.train.split = 'linear'  # tokens by stage: linear (later stages get more), constant, cosine
  config.train.optimizer_state = 'carry'  # moments of surviving weights across prunings, or reset
  config.train.remat = False  # recompute each layer in the backward pass: less memory, about a third slower
  config.train.save_every = 500  # steps between checkpoints; every stage end is saved too
  config.train.distill = ConfigDict()
  config.train.distill.alpha = 0.0  # weight of distillation from the dense model; 0 = off
  config.train.distill.temperature = 2.0

  config.evaluate = ConfigDict()
  config.evaluate.source = ()  # held-out text for perplexity
  config.evaluate.length = 1024  # tokens of a window; windows do not overlap
  config.evaluate.batch = 4  # windows at once
  config.evaluate.max_tokens = 0  # windows spread evenly over the text, so many tokens at most; 0 = all

  # Mode sensitivity: perplexity when one decoder layer alone is pruned, for every layer (the paper's Fig. 1).
  config.sensitivity = ConfigDict()
  # Of the one layer. Whole KV groups go, rounded down: of 3 groups at 0.5 one goes. The MLP keeps
  # floor(channels * (1 - sparsity)), rounded up to prune.align_ffn. The last group and channel stay.
  config.sensitivity.sparsity = 0.5
  # A curve each: the sparsity of every layer of the model that it starts from, rounded alike; 0 = dense.
  config.sensitivity.bases = (0.0, 0.2, 0.4)
  config.sensitivity.blocks = ('both',)  # what is pruned of the layer, a curve each: both, attention, mlp

  # Mode compare: a grid over any fields but model.source, each cell a run of its own (configs/ablations.py).
  config.compare = ConfigDict()
  # A tuple of groups {'prune.method': ('adapt', 'flap'), 'prune.target': (0.9, 0.8)}: all combinations of
  # each, none twice. A field that a group does not name has this config's value there.
  config.compare.grid = ()
  config.compare.recover = False  # whether cells are trained as train.* says; else they are only pruned
  config.compare.x = 'prune.target'  # the field along the plots' x axis
  config.compare.over = 'seed'  # the field whose values are repetitions: median and range in tables and plots

  config.export = ConfigDict()
  config.export.dtype = 'auto'  # of the weights in hf/: as in the source, or float32, bfloat16, float16
  return config
