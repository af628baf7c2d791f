"""Converts documents to token ids and targets, with special tokens, chat templates and parallel processes."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing.context
import os
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from adapt_jax.data.chats import Text, render_prompts, try_to_render
from adapt_jax.data.documents import Document
from adapt_jax.models.errors import InputError, reading

BATCH_CHARS = 1 << 20  # tokenised in one call: enough to keep every core busy
_ALONE_CHARS = 1 << 25  # tokenised before worker processes are started, which takes seconds
# A tokenizer uses all cores by itself, but rendering chats and making arrays use one core: on chats one
# process reaches at most 1.3 M tokens/s, one core 0.5 M. On two cores, worker processes measure slower.
_FEW_CORES = 4


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Documents one after another: `tokens` uint32 [n], `targets` bool [n], and their `lengths` int64 [d].

  refused: for each conversation that the chat template does not render, the reason.
  """

  tokens: np.ndarray
  targets: np.ndarray
  lengths: np.ndarray
  refused: tuple[str, ...] = ()


def take(documents: Iterator[Document], chars: int) -> list[Document]:
  """Takes documents until they have `chars` characters in all."""
  batch, size = list[Document](), 0
  while size < chars and (document := next(documents, None)) is not None:
    batch.append(document)
    size += document.size
  return batch


def encode(texts: Sequence[Text], tokenizer: Any) -> Encoded:
  """Token ids, with special tokens around plain text and an EOS at the end, if the tokenizer has them.

  All tokens but a BOS at the start are targets; in a conversation only the assistant's.
  """
  ids, targets = [np.zeros(0, np.uint32)], [b'']
  for found, counts in _tokenise(texts, tokenizer):
    ids.append(np.array(found, np.uint32))
    targets.append(counts)
  lengths = np.array([len(counts) for counts in targets[1:]], np.int64)
  return Encoded(np.concatenate(ids), np.frombuffer(b''.join(targets), np.bool_), lengths)


def encode_all(
  batches: Iterator[list[Document]], tokenizer: Any, workers: int | None = None
) -> Iterator[Encoded]:
  """Encodes each batch, in order; after `_ALONE_CHARS` characters in `workers` processes. Raises InputError.

  Conversations that the chat template refuses are left out.

  workers: by default one per core, but none on few cores.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  workers = workers or (cores if cores > _FEW_CORES else 1)
  if type(tokenizer).__module__ == '__main__':  # a class of the caller's script, which workers do not import
    workers = 1
  chars = 0
  for batch in batches:
    yield _encode_documents(batch, tokenizer)
    chars += sum(document.size for document in batch)
    if workers > 1 and chars >= _ALONE_CHARS:
      yield from _encode_parallel(batches, tokenizer, workers)
      return


class _Worker(multiprocessing.context.SpawnProcess):
  """A worker with SIGTERM blocked: `terminate`, which the pool calls after a worker was killed, kills it."""

  def terminate(self) -> None:
    self.kill()


class _Context(multiprocessing.context.SpawnContext):
  Process = _Worker


def _encode_parallel(batches: Iterator[list[Document]], tokenizer: Any, workers: int) -> Iterator[Encoded]:
  # Spawned, since JAX has threads and a forked child may hang. Workers have only what is sent to them.
  pool = concurrent.futures.ProcessPoolExecutor(workers, _Context(), _start_worker, (tokenizer,))
  pending: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
  try:
    for batch in batches:
      with _starting_workers():
        pending.append(pool.submit(_work, batch))
      if len(pending) > 2 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except BrokenProcessPool:
    raise InputError(
      'a tokenising process was killed, perhaps for lack of memory: start again with fewer cores or '
      'shorter documents'
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
  """Processes started inside block SIGTERM, and do not import the caller's main module.

  A scheduler may send SIGTERM to all processes, but the run ends its workers. A caller's script may have no
  `if __name__ == '__main__'`, so that a worker that imports it would run it again.
  """
  before, main = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}), sys.modules['__main__']
  sys.modules['__main__'] = types.ModuleType('__main__')
  try:
    yield
  finally:
    sys.modules['__main__'] = main
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_tokenizer: Any = None


def _start_worker(tokenizer: Any) -> None:
  global _worker_tokenizer
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # there is already one process per core
  _worker_tokenizer = tokenizer


def _work(batch: list[Document]) -> Encoded:
  return _encode_documents(batch, _worker_tokenizer)


def _encode_documents(batch: list[Document], tokenizer: Any) -> Encoded:
  texts, refused = list[Text](), list[str]()
  for document in batch:
    chat = not isinstance(document.content, str)
    text = try_to_render(document, tokenizer) if chat else Text(str(document.content))
    if isinstance(text, Text):
      texts.append(text)
    else:
      refused.append(str(text))
  with reading('the tokenizer', f'(from {batch[0].where} on)', "check the model's tokenizer and the text"):
    return dataclasses.replace(encode(texts, tokenizer), refused=tuple(refused))


def _tokenise(batch: Sequence[Text], tokenizer: Any) -> Iterator[tuple[list[int], bytes]]:
  """Yields each text's token ids and, one byte per token, whether it is a target."""
  for plain, group in itertools.groupby(batch, lambda text: text.spans is None):
    texts = list(group)
    encoded = tokenizer(
      [text.text for text in texts],
      add_special_tokens=plain,  # a chat template adds its own
      return_offsets_mapping=not plain,
      return_attention_mask=False,
      return_token_type_ids=False,
      verbose=False,  # no warning that a document is longer than the model's context
    )
    for index, text in enumerate(texts):
      ids = encoded['input_ids'][index]
      if text.spans is None:
        # Without a BOS at the start: no text predicts it.
        counts = b'\1' * len(ids)
        if ids[:1] == [tokenizer.bos_token_id]:
          counts = b'\0' + counts[1:]
      else:
        counts = _inside(encoded['offset_mapping'][index], text.spans)
      eos = tokenizer.eos_token_id
      if eos is not None and ids[-1:] != [eos]:  # some tokenizers and templates already add it
        ids, counts = [*ids, eos], counts + bytes([plain])
      yield ids, counts


def encode_prompts(texts: Sequence[str], tokenizer: Any, chat: bool) -> list[list[int]]:
  """Ids of texts to be continued, without an EOS at their ends; may be empty.

  With `chat` and a chat template, a text is rendered as the user's message, up to the start of the answer.
  Raises InputError if the template refuses one.
  """
  if chat and tokenizer.chat_template:
    messages = [[{'role': 'user', 'content': text}] for text in texts]
    prompts = render_prompts(messages, tokenizer, add_generation_prompt=True)
    return [tokenizer(prompt, add_special_tokens=False)['input_ids'] for prompt in prompts]
  found = [tokenizer(text)['input_ids'] for text in texts]
  return [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> bytes:
  # A token belongs to the span that contains its last character: unlike the start, the end is exact for
  # byte-level tokenizers that exclude the space before a word from its offsets.
  ends = np.array([end for _, end in offsets], np.int64)
  counts = np.zeros(ends.shape, np.bool_)
  for first, last in spans:
    counts |= (first < ends) & (ends <= last)
  return counts.tobytes()
