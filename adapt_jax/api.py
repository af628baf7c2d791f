"""The library: load, prune, recover, measure and save models in memory, on plain pytrees of arrays.

Options and defaults are the command line's. Everything runs in one process, on the devices and
the mesh (`jax.set_mesh`) of the caller, and prints nothing unless `progress=True`. Wrong values raise
`InputError`, a subclass of ValueError.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adapt_jax import api_arguments as arguments
from adapt_jax.api_arguments import Text
from adapt_jax.api_model import Model, load, save
from adapt_jax.config.build import from_dict
from adapt_jax.config.targets import listed
from adapt_jax.config.values import SELF
from adapt_jax.data.documents import is_blocks, open_blocks
from adapt_jax.data.token_cache import used_ids
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.data.windows import Blocks, read_for, spread
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.generation import self_text
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import Sampling, stop_ids
from adapt_jax.machine import mesh, processes
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.checks import check_teacher
from adapt_jax.pipeline.schedule import reachable_target
from adapt_jax.pipeline.vocabulary import trim
from adapt_jax.pruning import surgery
from adapt_jax.pruning.criteria import Importance
from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.narrow import check as check_width
from adapt_jax.pruning.narrow import narrow as narrow_params
from adapt_jax.pruning.narrow import narrowed_config
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner, prune_model
from adapt_jax.pruning.score_memo import ScoreMemo
from adapt_jax.training.healing import Healing
from adapt_jax.training.loop import recover_model
from adapt_jax.training.optim import optimizer
from adapt_jax.training.precision import chosen
from adapt_jax.training.rate import with_rate
from adapt_jax.training.step import Teacher, begin

__all__ = (
  'InputError', 'Model', 'generate', 'load', 'narrow', 'perplexity', 'prune', 'recover', 'rows', 'save',
  'trim_vocabulary',
)  # fmt: skip


def rows(
  model: Model,
  text: Text,
  *,
  samples: int = 32,
  length: int | None = None,
  own: float = 0.25,
  seed: int = 0,
  text_field: str = 'text',
  messages_field: str = 'messages',
  progress: bool = False,
) -> np.ndarray:
  """Calibration rows, int32 [samples, length], drawn from a text.

  text: a file, several, a directory, or a hub data set, as in `prune.calibration.source`; or token ids
  [N, T]; or 'self': the model generates the rows. length: tokens of a row; None: T for ids, 1,024 for texts.
  own: the share of rows that the model, which should be the dense one, generates beside a text
  (docs/texts.md). text_field, messages_field: fields of .jsonl, .json, .parquet and hub rows that hold a
  text or a chat. Raises InputError if there are fewer rows.
  """
  with processes.silent(not progress):
    length = arguments.row_length(text, length)
    data = {'text_field': text_field, 'messages_field': messages_field}
    asked = {'samples': samples, 'length': length, 'own': own}
    options = from_dict({'seed': seed, 'data': data, 'prune': {'calibration': asked}})
    alone = isinstance(text, str) and text == SELF
    count = samples if alone else 0 if arguments.is_ids(text) else round(own * samples)
    generated = np.zeros((0, length), np.int32)
    if count:
      arguments.check_tokenizer(model.tokenizer)
      self_text.check((SELF,), length, model.config.max_position, 'prune.calibration')
      # Rows beside several texts, which are joined, must differ.
      beside = [] if alone else [zlib.crc32('\n'.join(arguments.entries(text)).encode())]
      drawn = {'seed': [seed, self_text.CALIBRATION, *beside], 'dtype': compute_dtype('auto')}
      generated = self_text.in_memory(model.config, model.params, model.tokenizer, count, length, **drawn)
    if count == samples:
      return generated
    blocks = arguments.blocks(text, options, model, length, samples * (length + 1))
    return np.concatenate([blocks.tokens[blocks.draw(samples - count, seed, 0)], generated])


def trim_vocabulary(
  model: Model,
  text: Text,
  *,
  text_field: str = 'text',
  messages_field: str = 'messages',
  progress: bool = False,
) -> Model:
  """The model with only the tokens of a text in its vocabulary, and tokens that these need.

  `model` stays as it is. On this text the new tokenizer gives the same tokens, with other ids. On others,
  words split into more tokens where theirs are gone. The result predicts as `model` does, on the condition
  that the next token is one of the kept (docs/vocabulary.md).

  text: all of it is read; as for `rows`, or token ids [N, T]. text_field, messages_field: as for `rows`.
  Raises InputError for a tokenizer that cannot be trimmed.
  """
  arguments.check_tokenizer(model.tokenizer)
  if not arguments.is_ids(text) and is_blocks(arguments.entries(text)):
    text = open_blocks(arguments.entries(text), 'text')
  if arguments.is_ids(text):
    used = np.unique(arguments.token_ids(text, model.config, 'text')).tolist()
  else:
    fields = {'field': 'text', 'text_field': text_field, 'messages_field': messages_field}
    with processes.silent(not progress):
      used = used_ids(None, arguments.entries(text), model.tokenizer, **fields)
  kept = trim(model.config, model.tokenizer, model.generation, used)
  small: dict[str, Any] = {'tokenizer': kept.tokenizer, 'generation': kept.generation}
  return dataclasses.replace(model, config=kept.config, params=kept.cut(model.params), **small)


def narrow(
  model: Model, rows: np.ndarray | jax.Array, *, hidden_size: int, batch: int = 4, progress: bool = False
) -> Model:
  """The model with a smaller hidden size, the same in all layers. `model` stays as it is.

  Args:
    rows: token ids [S, T] of the kinds of text that the model should stay good at.
    hidden_size: of the result, smaller than in `model`.
    batch: rows that a layer processes at once on each device.

  `prune` can follow (docs/hidden-size.md). Raises InputError for a family whose stream cannot be rotated.
  """
  arguments.check_model(model.config)
  tokens = arguments.calibration_rows(rows, model.config)
  check_width(model.config, hidden_size, 'hidden_size')
  config = narrowed_config(model.config, hidden_size)
  arguments.check_model(config)  # the mesh may split the hidden size
  with processes.silent(not progress):
    params = narrow_params(
      model.config,
      model.params,
      mesh.put_rows(np.arange(len(tokens)), lambda ids: (tokens[ids],))[0],
      hidden_size,
      micro_batch=mesh.rows_at_once(len(tokens), batch),
      dtype=compute_dtype('auto'),
      compiler=Compiler(),
    )
  return dataclasses.replace(model, config=config, params=params)


def prune(
  model: Model,
  rows: np.ndarray | jax.Array,
  *,
  target: float | str | Sequence[float | str] = 0.8,
  method: str | type[Method] = 'obs',
  importance: str | Importance = '',
  seed: int = 0,
  progress: bool = False,
  **options: Any,
) -> Any:
  """The model with fewer KV groups (or query heads) and MLP channels, and the `PrunePlan` of what it keeps.

  `model` stays as it is. For a list of targets: a list of such pairs, which share the scoring pass.

  Args:
    rows: token ids [S, T] of the kinds of text that the model should stay good at; all are scored on.
    target: what to keep, as `prune.target`: a fraction of the parameters of `model` (up to 1), a number of
      parameters (above 1), or a text such as '0.5kv' or '600MB@q8_0'; latency, ms and tok/s also need
      latency_table. Bytes are counted in `model.dtype`. The request is one prompt of 512 tokens, continued
      by 64.
    method: a name that `prune.method` may have, or a subclass of `adapt_jax.pruning.methods.base.Method`.
    importance: for `adapt`, `uniform` and methods without one of their own; a name, or an `Importance`.
      Empty: taylor.
    options: other options of `config.prune`, by name: heal, compensate, steps, align_ffn and so on.

  Healing makes the weights float32; with heal=0 they keep their dtype. A model may be pruned again after
  `recover`. Raises InputError for wrong options and unreachable targets.
  """
  arguments.check_model(model.config)
  tokens = arguments.calibration_rows(rows, model.config)
  named: dict[str, Any] = {'target': target, **options}
  named |= {'method': method} if isinstance(method, str) else {}
  named |= {'importance': importance} if isinstance(importance, str) and importance else {}
  asked = arguments.prune_options(named, tokens, model.config, seed)
  settings, kind = asked.prune, arguments.pruning_method(asked.prune.method, method, importance)
  config, params = model.config, model.params
  if settings.compensate == 'bias' and not config.output_bias:
    config, params = surgery.with_output_bias(config, params)
  sizes = [dataclasses.replace(settings, target=of) for of in listed(settings.target)]
  with processes.silent(not progress):
    blocks = Blocks(tokens, np.ones(tokens.shape, bool), 0)
    dtype, compiler = compute_dtype('auto'), Compiler()
    common: dict[str, Any] = {'seed': seed, 'compiler': compiler, 'dtype': dtype}
    common |= {'method': kind, 'memo': ScoreMemo() if len(sizes) > 1 else None}
    pruners = []
    for of_size in sizes:
      limit = budget_of(dataclasses.replace(asked, prune=of_size), model.config, model.dtype)
      pruners.append(Pruner(config, of_size, blocks, budget=limit, **common))
      reachable_target(pruners[-1].method, of_size.limit)
    healing = None
    if settings.heal:
      trained = compute_dtype(chosen(asked.training_dtype))
      dense = Teacher(config, jax.tree.map(lambda x: x.astype(trained), params))
      args, micro_batch = (tokens, settings.heal, dense, params), settings.calibration.batch
      healing = Healing(*args, micro_batch=micro_batch, seed=seed, compiler=compiler, dtype=trained)
      del dense, args
    found = [_pruned(model, config, params, pruner, healing) for pruner in pruners]
  return found if isinstance(target, (list, tuple)) or len(found) > 1 else found[0]


def _pruned(
  model: Model, config: ModelConfig, params: Params, pruner: Pruner, healing: Healing | None
) -> tuple[Model, PrunePlan]:
  """The model pruned to the target of the pruner's options, from `params` with the run's biases."""
  budget = pruner.method.budget
  start = PruneState.start(config, budget.removes)
  wanted = budget.target(pruner.options.limit)
  arrays, state = prune_model(pruner, lambda: {'params': params}, start, wanted)
  small = state.plan.pruned_config(config)
  if healing and not state.plan.equals(start.plan):
    healing.heal(small, arrays)
  origin = dataclasses.replace(model.origin, attention=budget.removes.name)
  return dataclasses.replace(model, config=small, origin=origin, **arrays), state.plan


def recover(
  model: Model,
  text: Text,
  *,
  tokens: int,
  teacher: Model | None = None,
  seed: int = 0,
  text_field: str = 'text',
  messages_field: str = 'messages',
  progress: bool = False,
  **options: Any,
) -> Model:
  """The model after training on `tokens` tokens of a text; `model` stays as it is.

  Args:
    text: a file, several for a mixture, a directory or a hub data set; or token ids [N, T], such as
      rows(model, 'self', seed=1). Other seeds give other rows.
    teacher: the model to distil from: the dense one, or any with the same tokenizer. KL from it is half of
      the loss, or another share: distill={'alpha': share}. The rest is cross-entropy on the text, which is
      the whole loss without a teacher.
    text_field: as for `rows`.
    messages_field: as for `rows`.
    options: other options of `config.train`, by name: lr, batch, length, dtype, weights and so on. Without
      lr, the learning rate follows from the weights of `model`.

  Weights are float32 afterwards. The tokens of the text are kept in the user's cache directory. Raises
  InputError.
  """
  arguments.check_model(model.config)
  if teacher is not None:
    check_teacher('teacher', teacher.config, teacher.tokenizer, model.config, model.tokenizer)
  data, named = {'text_field': text_field, 'messages_field': messages_field}, {'tokens': tokens, **options}
  asked = arguments.train_options(text, named, teacher is not None, seed=seed, data=data)
  settings = with_rate(asked.train, model.params)
  steps = settings.tokens // (settings.batch * settings.length)
  tx, given = optimizer(settings, steps), None
  with processes.silent(not progress):
    dtype = compute_dtype(chosen(asked.training_dtype))
  if teacher is not None and settings.distill.alpha:
    given = Teacher(teacher.config, jax.tree.map(lambda x: x.astype(dtype), teacher.params))
  with processes.silent(not progress):
    rows = arguments.train_set(text, asked, model)

    state = begin(model.params, tx)
    common: dict[str, Any] = {'dtype': dtype, 'compiler': Compiler(), 'teacher': given}
    taken = recover_model(model.config, state, rows, settings, tx, stop=steps, total=steps, **common)
    del state
    *_, last = taken
  assert last.state is not None
  return dataclasses.replace(model, params=last.state['params'])


def perplexity(
  model: Model,
  text: Text,
  *,
  length: int = 1024,
  max_tokens: int = 0,
  batch: int = 4,
  text_field: str = 'text',
  messages_field: str = 'messages',
  progress: bool = False,
) -> float:
  """exp of the mean cross-entropy over windows of `length` tokens of a text.

  text: a file, several, a directory or a hub data set; or token ids [N, T], each row a window. max_tokens: of
  the text, in windows spread evenly over its first 4 million tokens, or over max_tokens if that is more; 0:
  all. text_field, messages_field: as for `rows`. Raises InputError.
  """
  with processes.silent(not progress):
    mesh.check_model(model.config)
    data = {'text_field': text_field, 'messages_field': messages_field}
    asked = {'length': length, 'max_tokens': max_tokens, 'batch': batch}
    options = from_dict({'data': data, 'evaluate': asked})
    blocks = spread(arguments.blocks(text, options, model, length, read_for(max_tokens)), max_tokens)
    evaluator = Evaluator(blocks, batch, compiler=Compiler(), dtype=compute_dtype('auto'))
    return evaluator.perplexity(model.config, model.params, 'perplexity')


def generate(
  model: Model,
  prompt: str | Sequence[str],
  *,
  max_new_tokens: int = 128,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  chat: bool = True,
  seed: int = 0,
  progress: bool = False,
) -> Any:
  """The continuation of a prompt as a string, or a list of continuations for several prompts.

  chat: whether to render prompts with the chat template, if there is one, as user messages; otherwise they
  are continued as plain text. temperature 0 takes the most likely tokens. Raises InputError for a prompt
  that is too long or, without a template, empty.
  """
  mesh.check_model(model.config)
  arguments.check_tokenizer(model.tokenizer)
  asked = {'max_new_tokens': max_new_tokens, 'chat': chat, 'temperature': temperature}
  from_dict({'seed': seed, 'generate': asked})  # checks them
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  ids = encode_prompts(prompts, model.tokenizer, chat)
  sampling = Sampling(temperature, top_k, top_p)
  stop = stop_ids(model.generation, model.tokenizer)
  with processes.silent(not progress):
    generator = Generator(model.config, model.params, compiler=Compiler(), dtype=compute_dtype('auto'))
    with Progress('generate', len(ids) * max_new_tokens, 'tokens') as bar:
      new = generator.generate(ids, max_new_tokens, sampling, stop, seed, progress=bar)
  texts = [model.tokenizer.decode(x, skip_special_tokens=True) for x in new]
  return texts[0] if isinstance(prompt, str) else texts
