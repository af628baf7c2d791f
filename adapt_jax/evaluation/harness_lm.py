"""Our models as an `LM` of lm-evaluation-harness, with the same results as its own `hf` model.

Only `harness.py` imports this, and only if tasks are requested: lm_eval is an optional package.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from adapt_jax.generation.generator import Generator, bucket
from adapt_jax.generation.sampling import Sampling, stop_ids
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import put_rows
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import row_shards
from adapt_jax.training import loss

_SHORTEST = 32  # tokens of the shortest rows
_FEW = 32  # scored tokens of a row with short answers
_PIECE = 32  # new tokens between two searches for stop strings
_NEW_TOKENS = 256  # if a task sets no number


@dataclasses.dataclass(frozen=True)
class _Row:
  """One input row of the model: its tokens, and the answers that are scored at their end.

  answers: (number of the request, its continuation); the continuation's last token follows the row's last.
  """

  tokens: tuple[int, ...]
  answers: list[tuple[int, list[int]]]

  @property
  def scored(self) -> int:
    return sum(len(answer) for _, answer in self.answers)

  @property
  def shape(self) -> tuple[int, int]:
    """(tokens, scored tokens) of the padded row."""
    length = bucket(len(self.tokens), _SHORTEST)
    return length, _FEW if self.scored <= _FEW else length


def _rows(requests: list[tuple[Any, list[int], list[int]]], longest: int) -> list[_Row]:
  """The rows for all requests. Requests with the same input, such as one-token choices, share a row."""
  found: dict[tuple[int, ...], list[_Row]] = {}
  for number, (_, context, answer) in enumerate(requests):
    tokens = tuple((context + answer)[-longest - 1 : -1])  # truncated from the left
    rows = found.setdefault(tokens, [])
    if not rows or rows[-1].scored + len(answer) > _FEW:
      rows.append(_Row(tokens, []))
    rows[-1].answers.append((number, answer))
  return [row for rows in found.values() for row in rows]


def _batches(rows: list[_Row], tokens: int) -> Iterator[tuple[list[_Row], int]]:
  """Yields (rows of one shape, batch size of this shape), the longest first.

  tokens: the most at once on a device, but at least one row. All batches of a shape have the same size and so
  share a program.
  """
  groups: dict[tuple[int, int], list[_Row]] = {}
  for row in rows:
    groups.setdefault(row.shape, []).append(row)
  shards = row_shards()
  for shape in sorted(groups, reverse=True):
    group = sorted(groups[shape], key=lambda row: (-len(row.tokens), row.tokens))
    count = -(-len(group) // (shards * max(1, tokens // shape[0])))
    size = shards * -(-len(group) // (count * shards))
    for start in range(0, len(group), size):
      yield group[start : start + size], size


@dataclasses.dataclass(frozen=True)
class _Score:
  """(log-probabilities, whether most likely) [B, P] of labels [B, P] after positions [B, P] of tokens."""

  config: ModelConfig
  dtype: Any

  def __call__(
    self, params: Params, tokens_BT: jax.Array, positions_BP: jax.Array, labels_BP: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x_BTD = llama.hidden_states(self.config, params, tokens_BT, dtype=self.dtype)
    x_BPD = jnp.take_along_axis(x_BTD, positions_BP[:, :, None], axis=1)
    x_TD = x_BPD.reshape(-1, x_BPD.shape[-1])
    found = loss.label_log_probs(x_TD, llama.head(params), labels_BP.reshape(-1), self.config.logit_cap)
    return found[0].reshape(labels_BP.shape), found[1].reshape(labels_BP.shape)


class FlaxLM(TemplateLM):
  """The model as an `LM` of the harness.

  Args:
    config, params: the model, on the mesh if one is set.
    tokenizer: a tokenizer of transformers.
    generation: fields of generation_config.json, for tasks that generate text.
    tokens: tokens at once on a device.
    compiler: counts compiles as `harness`: one for each length of padded rows, two if rows of that length
      have short and long answers.
    dtype: dtype of weights in products and of activations.
    title: title of the progress bar.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokenizer: Any,
    generation: dict[str, Any],
    *,
    tokens: int,
    compiler: Compiler,
    dtype: Any,
    title: str,
  ):
    super().__init__()
    self.tokenizer, self.max_length = tokenizer, config.max_position
    self._config, self._params, self._tokens, self._title = config, params, tokens, title
    self._compiler, self._dtype, self._generation = compiler, dtype, generation
    self._programs: dict[tuple[int, ...], Any] = {}
    if self.prefix_token_id is None:
      raise InputError('evaluate.tasks: the tokenizer of model.source has neither BOS nor EOS token')
    self._prefix = tokenizer.decode([self.prefix_token_id])

  # -- tokens, as HFLM has them ---------------------------------------------------------------------

  @property
  def eot_token_id(self) -> int | None:
    """The end token; None if the tokenizer has only BOS."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int | None:
    """The token before a text without context: BOS if there is one, else the end token."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds by itself, but without a second BOS."""
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self._prefix)
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

  # -- requests -------------------------------------------------------------------------------------

  def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether greedy decoding gives it) of each continuation after its context."""
    return super().loglikelihood(requests, disable_tqdm=True)  # we show our own progress

  def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
    """Log-probability in nats of each text; long texts are split into windows of the model's length."""
    windows, counts = [], []
    for request in requests:
      found = get_rolling_token_windows(
        self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
      )
      own = [(None, *make_disjoint_window(window)) for window in found]
      windows += own
      counts.append(len(own))
    scores = iter(self._loglikelihood_tokens(windows))
    return [sum(next(scores)[0] for _ in range(count)) for count in counts]

  def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
    for _, context, answer in requests:
      if not context or not 0 < len(answer) <= self.max_length:  # the harness's own model asserts it too
        raise InputError(
          f'evaluate.tasks: a question has {len(context)} tokens and an answer of {len(answer)}; both need '
          f'one, and the answer at most {self.max_length}: correct the task, or leave it out'
        )
    results = [(0.0, True)] * len(requests)
    with Progress(self._title, len(requests), 'requests') as progress:
      for rows, size in _batches(_rows(requests, self.max_length), self._tokens):
        preemption.check()
        log_probs, likeliest = self._score(rows, size)
        for r, row in enumerate(rows):
          start = 0
          for number, answer in row.answers:
            part = np.s_[r, start : start + len(answer)]
            results[number] = float(log_probs[part].sum(dtype=np.float64)), bool(likeliest[part].all())
            start += len(answer)
        progress.update(sum(len(row.answers) for row in rows))
    return results

  def _score(self, rows: list[_Row], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The result of `_Score` for rows of one shape, with concatenated answers; the batch has `size` rows."""
    length, most = rows[0].shape
    tokens = np.zeros((size, length), np.int32)
    positions, labels = np.zeros((2, size, most), np.int32)
    for r, row in enumerate(rows):
      count, start = len(row.tokens), 0
      tokens[r, :count] = row.tokens
      for _, answer in row.answers:
        part = np.s_[r, start : start + len(answer)]
        positions[part], labels[part] = np.arange(count - len(answer), count), answer
        start += len(answer)
    arrays = put_rows(np.arange(size), lambda ids: (tokens[ids], positions[ids], labels[ids]))
    if (program := self._programs.get((size, length, most))) is None:
      score = _Score(self._config, self._dtype)
      program = self._programs[size, length, most] = self._compiler('harness', score, self._params, *arrays)
    log_probs, likeliest = program(self._params, *arrays)
    return np.asarray(log_probs), np.asarray(likeliest)

  # -- texts ----------------------------------------------------------------------------------------

  def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
    """The text that the model generates after each context, up to the first stop string."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    texts = [''] * len(requests)
    with Progress(self._title, len(requests), 'texts') as progress:
      for numbers in groups.values():
        contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
        for i, text in self._write(contexts, requests[numbers[0]].args[1]):
          texts[numbers[i]] = text
          progress.update(1)
    return texts

  def _write(self, contexts: list[list[int]], settings: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yields (index of the context, its text), batch by batch; settings: their task's generation_kwargs."""
    kwargs: Any = normalize_gen_kwargs(settings, _NEW_TOKENS)
    until, new_tokens = handle_stop_sequences(kwargs['until'], eos=None), kwargs['max_gen_toks']
    if new_tokens >= self.max_length:
      raise InputError(
        f'evaluate.tasks: a task asks for {new_tokens} new tokens of the {self.max_length} that model.source '
        f'reads: leave it out'
      )
    # What the task does not set is as in generation_config.json, and then as in transformers.
    given = {name: value for name, value in self._generation.items() if value is not None}
    defaults = {'temperature': 1.0, 'top_k': 50, 'top_p': 1.0, 'repetition_penalty': 1.0}
    names = [*defaults] if kwargs['do_sample'] else ['repetition_penalty']
    sampling = Sampling(**{name: (defaults | given | kwargs)[name] for name in names})
    prompts = [context[new_tokens - self.max_length :] for context in contexts]  # truncated from the left
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    room = bucket(len(prompts[order[0]]) + new_tokens, _SHORTEST)
    rows = row_shards() * max(1, self._tokens // room)
    generator = Generator(
      self._config, self._params, compiler=self._compiler, dtype=self._dtype, max_batch=rows
    )
    for start in range(0, len(order), rows):
      preemption.check()
      batch = order[start : start + rows]
      seed = start * new_tokens  # different in every batch, for questions that are asked several times
      texts = self._write_batch(generator, [prompts[i] for i in batch], until, new_tokens, sampling, seed)
      yield from zip(batch, texts, strict=True)

  def _write_batch(
    self,
    generator: Generator,
    prompts: list[list[int]],
    until: list[str],
    new_tokens: int,
    sampling: Sampling,
    seed: int,
  ) -> list[str]:
    """Generates texts piece by piece, since a stop string may be several tokens, or part of one."""
    encoded = [self.tokenizer.encode(stop, add_special_tokens=False) for stop in until]
    # Stop strings that decoding omits, such as <|im_end|>, end a text as the end token does.
    hidden = [ids[0] for ids in encoded if len(ids) == 1 and not self._decode(ids)]
    end = [] if self.eot_token_id is None else [self.eot_token_id]
    stops = stop_ids(self._generation, self.tokenizer) | {*end, *hidden}
    written: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()
    size = -(-new_tokens // -(-new_tokens // _PIECE))
    for done in range(0, new_tokens, size):
      # Finished texts are passed as one token and their results ignored: fewer rows would need a new compile.
      texts = [p[:1] if i in ended else p + written[i] for i, p in enumerate(prompts)]
      pieces = generator.generate(texts, min(size, new_tokens - done), sampling, stops, seed + done)
      for i in set(range(len(prompts))) - ended:
        written[i] += pieces[i]
        if len(pieces[i]) < size or any(stop in self._decode(written[i]) for stop in until):
          ended.add(i)
      if len(ended) == len(prompts):
        break
    return [postprocess_generated_text(self._decode(ids), until, None) for ids in written]

  def _decode(self, ids: list[int]) -> str:
    return self.tokenizer.decode(ids, skip_special_tokens=True)
