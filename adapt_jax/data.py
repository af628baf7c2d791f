"""Text to blocks of tokens, and which rows make up which batch.

Both row functions are pure functions of (seed, step): resuming needs only the step.
"""

import array
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from adapt_jax.documents import Document, Message, Source, is_blocks, open_blocks, read_documents
from models.errors import InputError, first_line

_BATCH_CHARS = 1 << 20  # tokenised in one call: enough to keep every core busy
_DATE = '26 Jul 2024'  # Llama's own fallback: the tokens must not depend on the day of the run


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Windows of tokens: `tokens` int32 [N, T], `targets` bool [N, T].

  `targets` is True where the prediction of this very token counts in the loss; the first column is
  False, since nothing in its window predicts it. `documents` is how many were read (0 for a .npy file).
  """

  tokens: np.ndarray
  targets: np.ndarray
  documents: int


@dataclasses.dataclass(frozen=True)
class _Text:
  """A text to tokenise; `spans` are the assistant's [start, end) characters, None for plain text."""

  text: str
  spans: list[tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """A source's documents one after another: `tokens` int32 [n], `targets` bool [n], how many documents."""

  tokens: np.ndarray
  targets: np.ndarray
  documents: int

  def blocks(self, length: int, field: str) -> Blocks:
    """Non-overlapping windows of `length` tokens, the tail dropped; InputError if there is not one."""
    return _cut(self.tokens, self.targets, length, sys.maxsize, self.documents, field)


def load_blocks(
  source: Source,
  tokenizer: Any,
  length: int,
  *,
  text_field: str,
  messages_field: str,
  field: str,
  max_tokens: int | None = None,
) -> Blocks:
  """Reads and tokenises `source` and cuts it into non-overlapping windows of `length` tokens.

  Documents stand one after another, each with the tokenizer's special tokens (BOS) in front and an EOS
  behind, as far as it has them; a conversation has those of its chat template, and only the assistant's
  tokens as targets. The tail shorter than a window is dropped. At most `max_tokens` tokens are kept, and
  no document beyond them is tokenised. A .npy source is taken as it is, `tokenizer` unused.

  Raises InputError, naming `field` or the file, for a source that cannot be read or is shorter than one
  window, and for conversations that the tokenizer's chat template cannot render.
  """
  if is_blocks(source):
    return _load_npy(source, length, sys.maxsize if max_tokens is None else max_tokens, field)
  fields = {'text_field': text_field, 'messages_field': messages_field}
  return load_stream(source, tokenizer, **fields, field=field, max_tokens=max_tokens).blocks(length, field)


def load_stream(
  source: Source,
  tokenizer: Any,
  *,
  text_field: str,
  messages_field: str,
  field: str,
  max_tokens: int | None = None,
) -> TokenStream:
  """What `load_blocks` cuts into windows: to be cut to several lengths without tokenising again."""
  limit = sys.maxsize if max_tokens is None else max_tokens
  documents = read_documents(source, field, text_field=text_field, messages_field=messages_field)
  texts = (_render(document, tokenizer) for document in documents)
  tokens, targets, count = array.array('i'), bytearray(), 0
  with tqdm.tqdm(total=max_tokens, desc=field, unit=' tokens', unit_scale=True, disable=None) as bar:
    # A token is seldom less than a character, so as many characters as tokens are missing are never
    # too many, and a few rounds get there without reading far beyond.
    while batch := _take(texts, min(_BATCH_CHARS, limit - len(tokens))):
      before = len(tokens)
      for ids, counts in _tokenise(batch, tokenizer):
        tokens.extend(ids)
        targets.extend(counts)
      count += len(batch)
      bar.update(len(tokens) - before)
  found = np.frombuffer(tokens, np.int32)[:limit], np.frombuffer(targets, np.bool_)[:limit]
  return TokenStream(*found, count)


def check_vocab(blocks: Blocks, vocab_size: int, field: str) -> None:
  """Raises InputError if a token id has no row in an embedding of `vocab_size` rows."""
  highest = int(blocks.tokens.max())
  if highest >= vocab_size:
    raise InputError(
      f'{field}: token id {highest}, but the embedding has only {vocab_size} rows: '
      'the vocabulary is larger than the embedding, use the tokenizer that belongs to the model'
    )


def batch_rows(num_rows: int, batch: int, seed: int, step: int) -> np.ndarray:
  """The rows of batch number `step`: int64 [batch].

  Every epoch visits each of `num_rows` rows once, in an order of its own; a batch may cross the border
  from one epoch into the next.
  """
  epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), num_rows)
  rows = np.empty(batch, np.int64)
  for epoch in np.unique(epochs):
    rows[epochs == epoch] = _permutation(num_rows, seed, int(epoch))[places[epochs == epoch]]
  return rows


def draw_rows(
  num_rows: int, count: int, seed: int, step: int, field: str = 'config.prune.calibration.samples'
) -> np.ndarray:
  """`count` distinct rows out of `num_rows`, drawn afresh for each step: int64 [count].

  All rows come in their given order. Raises InputError naming `field` if there are too few.
  """
  if count > num_rows:
    raise InputError(f'{field} = {count}, but the data have {num_rows} rows: lower it or give more data')
  if count == num_rows:
    return np.arange(num_rows)
  return _generator(seed, step, 1).choice(num_rows, count, replace=False)


@functools.lru_cache(maxsize=2)  # a batch that crosses a border needs two
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  return _generator(seed, epoch, 0).permutation(num_rows)


def _generator(seed: int, index: int, purpose: int) -> np.random.Generator:
  # The counter's last word keeps the streams of one key and different purposes apart.
  key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, purpose], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _load_npy(source: Source, length: int, limit: int, field: str) -> Blocks:
  blocks = open_blocks(source, field)
  if blocks.shape[1] != length:
    raise InputError(
      f'{field} {source[0]!r} has rows of {blocks.shape[1]} tokens, the sequence length is {length}: '
      f'set it to {blocks.shape[1]}'
    )
  tokens = np.array(blocks[: limit // length])
  if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max):
    raise InputError(f'{field} {source[0]!r} holds {tokens.min()} to {tokens.max()}: not token ids')
  tokens = tokens.astype(np.int32).ravel()
  return _cut(tokens, np.ones(tokens.shape, np.bool_), length, limit, 0, field)


def _cut(
  tokens: np.ndarray, targets: np.ndarray, length: int, limit: int, documents: int, field: str
) -> Blocks:
  """Cuts `tokens` and `targets` [tokens] into `Blocks`."""
  count = min(tokens.size, limit)
  rows = count // length
  if not rows:
    raise InputError(
      f'{field}: the sequence is longer than the data: {count} tokens, fewer than one window of {length}: '
      'give more data or a shorter sequence length'
    )
  targets = targets[: rows * length].reshape(rows, length).copy()
  targets[:, 0] = False
  return Blocks(tokens[: rows * length].reshape(rows, length), targets, documents)


def _take(texts: Iterator[_Text], chars: int) -> list[_Text]:
  """The next texts, until they have `chars` characters together."""
  batch: list[_Text] = []
  while chars > 0 and (text := next(texts, None)):
    batch.append(text)
    chars -= len(text.text)
  return batch


def _tokenise(batch: list[_Text], tokenizer: Any) -> Iterator[tuple[list[int], bytes]]:
  """Yields each text's token ids and, a byte a token, whether it is a target."""
  for plain, group in itertools.groupby(batch, lambda text: text.spans is None):
    texts = list(group)
    encoded = tokenizer(
      [text.text for text in texts],
      add_special_tokens=plain,  # a chat template writes its own
      return_offsets_mapping=not plain,
      return_attention_mask=False,
      return_token_type_ids=False,
      verbose=False,  # no warning that a document is longer than the model's context
    )
    for index, text in enumerate(texts):
      ids = encoded['input_ids'][index]
      if text.spans is None:
        counts = b'\1' * len(ids)
      else:
        counts = _inside(encoded['offset_mapping'][index], text.spans)
      eos = tokenizer.eos_token_id
      if eos is not None and ids[-1:] != [eos]:  # some tokenizers and templates end with it by themselves
        ids, counts = [*ids, eos], counts + bytes([plain])
      yield ids, counts


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> bytes:
  # A token belongs to the span that holds its last character: unlike the start, the end is exact for
  # byte-level tokenizers that leave the space before a word out of its offsets.
  ends = np.array([end for _, end in offsets], np.int64)
  counts = np.zeros(ends.shape, np.bool_)
  for first, last in spans:
    counts |= (first < ends) & (ends <= last)
  return counts.tobytes()


def _render(document: Document, tokenizer: Any) -> _Text:
  if isinstance(document.content, str):
    return _Text(document.content)
  if not tokenizer.chat_template or not tokenizer.is_fast:
    raise InputError(
      f'{document.where}: a conversation, but the tokenizer has no chat template or is not a fast one: '
      "use an instruction-tuned model's tokenizer, or data with a text field"
    )
  return _render_chat(document.content, tokenizer, document.where)


def _render_chat(messages: list[Message], tokenizer: Any, where: str) -> _Text:
  from jinja2 import TemplateError  # what transformers' chat templates raise

  if messages[0]['role'] == 'assistant':  # transformers renders no empty prompt
    raise InputError(
      f'{where}: the conversation begins with the assistant: put a system or user message first'
    )

  def render(count: int, prompt: bool) -> str:
    return tokenizer.apply_chat_template(
      messages[:count], tokenize=False, add_generation_prompt=prompt, date_string=_DATE
    )

  spans = []
  try:
    whole = render(len(messages), False)
    for index in (i for i, message in enumerate(messages) if message['role'] == 'assistant'):
      prompt, answered = render(index, True), render(index + 1, False)
      if not answered.startswith(prompt) or not whole.startswith(answered):
        raise InputError(
          f'{where}: the chat template does not allow to tell the tokens of assistant message {index + 1} '
          'apart (its rendering changes with what follows): use another template or plain text'
        )
      spans.append((len(prompt), len(answered)))
  except (TemplateError, TypeError) as error:
    raise InputError(f'{where}: the chat template refuses this conversation ({first_line(error)})') from None
  return _Text(whole, spans)
