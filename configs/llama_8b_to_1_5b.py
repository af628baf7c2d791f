"""Prunes LLaMA-3.1-8B to 1.5 B parameters in sixteen stages, distilling from the dense model.

    python main.py --config=configs/llama_8b_to_1_5b.py --workdir=out/llama-1.5b

It is not from the paper and has never been run: the settings are our own, for accelerators. The two embedding
tables, which are not pruned, are 1.05 B of the 1.5 B; the layers keep 6 % of their parameters. With
--config.prune.target=2_024_000_000 the layers keep as many parameters as those of Llama-3.2-1B have.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import base

STEPS = 5_000  # of 1,048,576 tokens each


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.source = 'meta-llama/Llama-3.1-8B'
  config.model.dtype = 'bfloat16'
  text = ('DKYoon/SlimPajama-6B',)  # a base model: web text, not instructions

  config.prune.target = 1.5e9
  config.prune.stages = 16
  config.prune.heal = 0  # of no use before so much training
  config.prune.stage_targets = 'geometric'  # every stage keeps nine tenths of its parameters
  config.prune.align_ffn = 128  # whole tiles of tensor cores, also with FSDP and tensor parallelism over 8
  config.prune.calibration.source = text
  config.prune.calibration.own = 0.0  # a base model's own text was not measured
  config.prune.calibration.samples = 64  # 65,536 tokens: about four times the widest MLP, which is refitted

  config.train.source = text
  config.train.batch = 512
  config.train.length = 2048
  config.train.tokens = STEPS * config.train.batch * config.train.length
  # Highest and final rate as in Minitron's runs on LLaMA-3.1-8B, arXiv 2408.11796, which also only distil.
  config.train.lr, config.train.min_lr = 1e-4, 1e-5
  config.train.distill.alpha = 1.0
  config.train.save_every = 250

  config.evaluate.source = ('Salesforce/wikitext:wikitext-2-raw-v1:validation',)
  return config
