"""All kinds of input that the fuzzer damages.

What the program imports late is imported here, and its first chat template rendered, once for all cases.
"""

import pyarrow.parquet  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from adapt_jax.data.tokenise import encode_prompts
from tests.fuzz import commands, gguf_files, models, run_state, texts
from tests.support.tokenizers_for_tests import tiny_tokenizer

encode_prompts(['warm'], tiny_tokenizer(), True)
KINDS = (*models.KINDS, *gguf_files.KINDS, *texts.KINDS, *run_state.KINDS, *commands.KINDS)
