"""Every field of a run with its default; recipes start from `get_config()` and set what differs.

    python main.py --config=configs/base.py --workdir=out/run \
        --config.model.source=HuggingFaceTB/SmolLM2-135M \
        --config.prune.calibration.source=calibration.txt \
        --config.train.source=corpus.jsonl --config.train.tokens=10_000_000 \
        --config.evaluate.source=heldout.txt

A source is a tuple of .txt, .jsonl, .json or .parquet files, directories or globs of them, or a hub data set
`org/name`, `org/name:split` or `org/name:config:split`; on the command line, names separated by commas.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The defaults: obs with least squares (the paper's: configs/adapt.py); model and data the recipe names."""
  config = ConfigDict()
  config.seed = 0  # of calibration draws, data order and everything else that is random

  config.model = ConfigDict()
  config.model.source = ''  # hub id, Hugging Face directory, .gguf file, or the workdir of a run
  # Of activations and matrix products (training keeps fp32 master weights): float32, bfloat16, or
  # auto: float32 on CPU, for figures that do not depend on the CPU's kind (bfloat16 is faster by
  # two fifths where it has AVX-512 BF16: benchmarks/RESULTS.md), bfloat16 on accelerators.
  config.model.dtype = 'auto'

  # Devices, of all processes (docs/cluster.md): -1 takes those that are left. fsdp: weights and optimizer
  # state are split over them, rows of a batch too. data: rows only. tensor: KV groups, MLP channels and
  # vocabulary; pruning then keeps widths that it divides.
  config.mesh = ConfigDict()
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 1

  config.data = ConfigDict()
  config.data.text_field = 'text'  # of .jsonl, .json, .parquet and hub rows
  config.data.messages_field = 'messages'  # rows that have it are chats: loss on the assistant's tokens
  # '': the tokenizer's own. Base models have none: plain (User: ... Assistant: ...), or a file of Jinja.
  config.data.chat_template = ''
  # Directory of tokenised training data, which may be deleted at any time. '': adapt-jax/tokens in
  # $XDG_CACHE_HOME or ~/.cache.
  config.data.cache = ''

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
  config.prune.align_kv = 1  # KV heads of a layer are multiples of this, or all that it has
  config.prune.align_ffn = (
    1  # MLP widths are multiples of this (64 to 256 suit tensor cores and quantisation)
  )
  # What is to run the result (docs/serving.md), which may ask more of the widths; checked before the run.
  # any. gguf: MLP widths in multiples of 32, for llama.cpp's quantised types (K-quants: align_ffn = 256).
  # tensor_parallel=n: n devices share every layer: KV heads and MLP widths that n divides.
  config.prune.serve = 'any'
  # 'reference': with the errors of the authors' program, to compare with it; adapt and uniform only,
  # compensate 'none'.
  config.prune.compat = ''
  config.prune.calibration = ConfigDict()
  # Text of the kind that the model shall stay good at; its first 4 million tokens are drawn from.
  config.prune.calibration.source = ()
  config.prune.calibration.samples = 32  # rows drawn afresh at every pruning step (the paper: 512)
  config.prune.calibration.length = 1024  # tokens of a row: as long as the text to come (the paper: 64)
  # Rows that pass a layer at once on a device, at most: memory only, not the result.
  config.prune.calibration.batch = 4

  config.train = ConfigDict()
  config.train.source = ()  # recovery text or chats
  # One an entry of source: its share of all rows seen; small sources repeat. (): the entries one after
  # another, of which the first max(tokens, 4 million) tokens are shuffled.
  config.train.weights = ()
  # packed: documents end to end in rows of length tokens; they do not see each other. padded: a document a
  # row, truncated and filled up, as the paper did.
  config.train.layout = 'packed'
  config.train.tokens = 0  # over all stages, padding included; 0 with --mode=prune only
  config.train.batch = 128  # rows per optimizer step
  config.train.micro_batch = 8  # rows at once on a device, at most (gradients accumulate)
  config.train.length = 1024  # tokens of a row
  config.train.lr = 2e-5  # peak learning rate
  config.train.min_lr = 2e-6  # at the end of the schedule
  config.train.schedule = 'wsd'  # warmup-stable-decay, or cosine
  config.train.warmup = 0.05  # fraction of all steps
  config.train.clip = 1.0  # global gradient norm
  config.train.split = 'linear'  # tokens by stage: linear (later stages get more), constant, cosine
  config.train.optimizer_state = 'carry'  # moments of surviving weights across prunings, or reset
  config.train.mu_dtype = 'float32'  # of Adam's first moment; bfloat16: 2 bytes a weight less
  # The backward pass computes each layer again: less memory, slower by a tenth (CPU) to a third. Else again
  # all but the products with weights.
  config.train.remat = False
  config.train.save_every = 500  # steps between checkpoints; every stage end is saved too
  config.train.distill = ConfigDict()
  config.train.distill.alpha = 0.0  # weight of distillation from the dense model; 0 = off
  config.train.distill.temperature = 2.0

  config.evaluate = ConfigDict()
  config.evaluate.source = ()  # held-out text for perplexity
  config.evaluate.length = 1024  # tokens of a window; windows do not overlap
  config.evaluate.batch = 4  # windows at once on a device
  config.evaluate.max_tokens = 0  # windows spread evenly over the text, so many tokens at most; 0 = all
  # Tasks, groups and tags of lm-evaluation-harness by name (docs/evaluation.md; pip install '.[eval]'), with
  # batch x length tokens at once on a device. Runs score the dense model, the last pruned, and it recovered.
  config.evaluate.tasks = ()
  config.evaluate.suite = ''  # paper: the whole protocol of the paper, besides tasks
  config.evaluate.tasks_path = ''  # directory with task YAML files of your own, such as on local data
  config.evaluate.fewshot = -1  # examples before each question, of tasks; -1 = as the task says
  config.evaluate.limit = 0  # questions of each task, the first ones; 0 = all

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

  # Mode plan: memory, arithmetic and time of a run, from shapes alone (docs/cluster.md).
  config.plan = ConfigDict()
  config.plan.devices = 8  # simulated, as config.mesh splits them; 0 = compile for the devices at hand
  config.plan.device_memory_gb = 80.0  # of each, in 10^9 bytes
  config.plan.peak_tflops = 989.0  # of each, in the dtype of the products (H100, bfloat16)
  config.plan.depths = ()  # two numbers of layers to compile and extrapolate from, where the whole takes long

  # Mode generate: --prompt=TEXT, which may be repeated, continued by model.source.
  config.generate = ConfigDict()
  config.generate.max_new_tokens = 128
  config.generate.temperature = 0.0  # 0 = always the likeliest token; else seeded by config.seed
  config.generate.top_k = 0  # draw among so many likeliest tokens only; 0 = all
  config.generate.top_p = 1.0  # and among the likeliest that have this share of the probability together
  config.generate.batch = 8  # prompts at once, over all devices
  # Prompts are a user's message in the chat template (the tokenizer's or data.chat_template), where there is
  # one; False: plain text that is continued.
  config.generate.chat = True
  config.generate.dense = ''  # a second model, such as the one before pruning, beside model.source

  # Mode bench: speed, memory and size of model.source beside those of a dense model.
  config.bench = ConfigDict()
  config.bench.dense = ''  # the model before pruning; '': the one that model.source came from, where it tells
  config.bench.prompt_length = 512  # tokens, random ids
  config.bench.new_tokens = 64  # decoded after each prompt
  config.bench.batch = 1  # prompts at once, over all devices
  config.bench.repeats = 5  # of each model, in turn

  config.export = ConfigDict()
  # Forms of the result, a directory of the workdir each (docs/serving.md). hf: transformers, vLLM, MLX-LM.
  # hf_padded: zeros up to the widest layer, for programs that know stock classes only. gguf: llama.cpp.
  config.export.formats = ('hf',)
  config.export.dtype = 'auto'  # of the weights: as in the source, or float32, bfloat16, float16
  config.export.gguf_types = ('auto',)  # a file each: auto (as dtype), F32, F16, BF16, Q8_0, Q4_0
  return config
