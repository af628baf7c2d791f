"""The published runs of Adapt-Pruner (arXiv 2502.03460), selected by name.

    python main.py --config=configs/published.py:mobilellm_350m_to_125m --workdir=out/mobilellm-125m

mobilellm_350m_to_125m, mobilellm_600m_to_350m, mobilellm_1b_to_600m, qwen_0.5b_to_350m, deepseek_1.5b_to_1b:
prune and recover in stages. llama_8b_20_percent, llama_8b_40_percent, llama_8b_60_percent: remove this share,
without training (--mode=prune).

Settings are those of the authors' scripts; the method is in its correct form: exact target sizes, one
schedule over all stages (docs/recipes.md). Models and data come from the hub; some require an account that
has accepted their terms.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from adapt_jax.configs import adapt

SAMPLES = 7_714_363  # rows of all training sets together, as the authors counted them: one epoch
TRAIN_SOURCES = (
  'Open-Orca/OpenOrca',
  'teknium/OpenHermes-2.5',
  'databricks/databricks-dolly-15k',
  'allenai/WildChat-1M',
  'lmsys/lmsys-chat-1m',
  'HuggingFaceH4/ultrachat_200k:train_sft',
  'openbmb/UltraInteract_sft',
  'yahma/alpaca-cleaned',
  'O1-OPEN/OpenO1-SFT',
)


class Run(NamedTuple):
  """One published run. target: as `prune.target`. min_lr None: only pruned."""

  source: str
  target: float
  stages: int = 1
  min_lr: float | None = None


# Stored parameters, as the authors' scripts have them. Only the figures for MobileLLM-350M, 376.1 to 143.1 M,
# count tied embeddings twice, [32000, 960] and [32000, 576]: 345.4 to the 124.6 M that MobileLLM-125M stores.
RUNS = {
  'mobilellm_350m_to_125m': Run('facebook/MobileLLM-350M', 124_635_456, 20, 0.0),
  'mobilellm_600m_to_350m': Run('facebook/MobileLLM-600M', 376_000_000, 9, 2e-6),
  'mobilellm_1b_to_600m': Run('facebook/MobileLLM-1B', 603_188_352, 10, 2e-6),
  'qwen_0.5b_to_350m': Run('Qwen/Qwen2.5-0.5B', 376_100_000, 5, 2e-6),
  'deepseek_1.5b_to_1b': Run('deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B', 1_005_461_760, 11, 2e-6),
  'llama_8b_20_percent': Run('meta-llama/Llama-3.1-8B', 0.8),
  'llama_8b_40_percent': Run('meta-llama/Llama-3.1-8B', 0.6),
  'llama_8b_60_percent': Run('meta-llama/Llama-3.1-8B', 0.4),
}


def get_config(variant: str = '') -> ConfigDict:
  """The recipe of a variant. Raises ValueError for an unknown one."""
  if variant not in RUNS:
    raise ValueError(f'variant {variant!r}: write published:NAME, a NAME of {", ".join(RUNS)}')
  run = RUNS[variant]
  config = adapt.get_config()
  config.model.source = run.source
  config.prune.target, config.prune.stages = float(run.target), run.stages
  config.prune.calibration.source = ('DKYoon/SlimPajama-6B',)
  config.prune.calibration.layout = 'documents'
  config.evaluate.source = ('Salesforce/wikitext:wikitext-2-raw-v1:validation',)
  if run.min_lr is not None:
    _train(config, run)
  return config


def _train(config: ConfigDict, run: Run) -> None:
  """One epoch over all samples, each in its own row of at most `length` tokens."""
  train = config.train
  train.layout = 'padded'
  config.data.chat_template = 'paper'  # for all models, also those that have a template
  train.source = TRAIN_SOURCES
  train.batch, train.length = 128, 1024
  train.tokens = math.ceil(SAMPLES / train.batch) * train.batch * train.length
  train.lr, train.min_lr = 2e-5, run.min_lr
  train.schedule = 'wsd'
