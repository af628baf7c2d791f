"""A byte-level BPE tokenizer small enough to train in a test."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adapt_jax.data.chats import Text, try_to_render
from adapt_jax.data.documents import Document

CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
  "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As SmolLM2 and Qwen2.5 do: a system message where the conversation brings none.
CHATML_DEFAULT_SYSTEM = (
  "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are terse.<|im_end|>\n' }}{% endif %}"
  + CHATML
)
_LINES = [
  'The quick brown fox jumps over the lazy dog, and the dog sleeps on.',
  'It was the best of times, it was the worst of times.',
  'user system assistant: what is the sum of two and three? The sum is five.',
]


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
  """320 ids, bytes included; '<s>' goes before plain text by itself, '</s>' is the EOS."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = ['<s>', '</s>', '<|im_start|>', '<|im_end|>']
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(_LINES, trainer)
  bos = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', tokenizer.token_to_id('<s>'))])
  # GPT-2's way: the space before a word is left out of the word's offsets.
  tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>')
  fast.chat_template = chat_template
  return fast


def render(document: Document, tokenizer: Any) -> Text:
  """The text of a conversation. Raises the error if the template refuses it."""
  text = try_to_render(document, tokenizer)
  if isinstance(text, Text):
    return text
  raise text
