"""Runs tasks of lm-evaluation-harness, the usual benchmark suite, on our models (docs/evaluation.md).

The package is optional, slow to import and slow to look up its 14,000 tasks, so it is only used if a config
names tasks.
"""

import contextlib
import difflib
import functools
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from adapt_jax.config.options import EvaluateOptions
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import local
from adapt_jax.models.network.llama import Params

_ZERO_SHOT = (
  'arc_easy', 'arc_challenge', 'hellaswag', 'openbookqa', 'piqa', 'winogrande', 'social_iqa', 'wikitext',
)  # fmt: skip
# The paper's protocol: task -> examples before each question.
PAPER: dict[str, int | None] = {
  **dict.fromkeys(_ZERO_SHOT, 0),
  'mmlu': 5,
  'truthfulqa_mc1': 1,  # in addition to the six examples that its prompt always has
  'truthfulqa_mc2': 1,
  'agieval': 0,
}
_SEED = 1234  # of few-shot examples and of NumPy, as in the harness
_RESAMPLES = 1000  # bootstrap samples, for standard errors without a formula

TaskScores = dict[str, dict[str, Any]]


def wanted(options: EvaluateOptions) -> dict[str, int | None]:
  """Task -> examples before each question, None = the task's own number. Named tasks override the suite's."""
  suite = PAPER if options.suite == 'paper' else {}
  return suite | dict.fromkeys(options.tasks)


def check_tasks(options: EvaluateOptions) -> None:
  """Opens all tasks, including their data. Raises InputError for errors that a user must correct.

  These are: lm_eval is not installed, an unknown name, a bad directory of task files, unavailable data.
  """
  if options.has_tasks:
    _open(tuple(wanted(options).items()), options.tasks_path)


def evaluate_tasks(
  options: EvaluateOptions,
  config: ModelConfig,
  params: Params,
  tokenizer: Any,
  generation: dict[str, Any],
  *,
  compiler: Compiler,
  dtype: Any,
  title: str,
) -> TaskScores:
  """Scores of a model on the tasks of the config, by task or group.

  Each has its metrics, such as acc and acc_norm (fractions), their standard errors, such as acc_stderr, if
  there are any, the task's `version` and `n`, the number of questions. A metric of filtered answers is named
  metric,filter. Raises InputError as `check_tasks` does, and `Preempted` between batches. Every process gets
  the same result.

  Args:
    params: parameters, on the mesh if one is set.
    generation: fields of generation_config.json.
    compiler: counts compiles as `harness`.
    dtype: dtype of weights in products and of activations.
    title: title of the progress bar.
  """
  names = _open(tuple(wanted(options).items()), options.tasks_path)[0]
  from adapt_jax.evaluation.harness_lm import FlaxLM

  tokens = options.batch * options.length
  common: dict[str, Any] = {'compiler': compiler, 'dtype': dtype, 'title': title}
  lm = FlaxLM(config, params, tokenizer, generation, tokens=tokens, **common)
  return _scores(evaluate_lm(options, lm), names)


def evaluate_lm(options: EvaluateOptions, lm: Any, log_samples: bool = False) -> dict[str, Any]:
  """The harness's report on any of its `LM` objects, on the tasks of the config."""
  from lm_eval import evaluator

  loaded = _open(tuple(wanted(options).items()), options.tasks_path)[1]
  # For standard errors without a formula the harness forks this process, which is unsafe with JAX's threads.
  os.environ['DISABLE_MULTIPROC'] = '1'
  random.seed(0)  # as simple_evaluate does, which would also need PyTorch, to set its seed
  np.random.seed(_SEED)
  for task in loaded['tasks'].values():
    task.set_fewshot_seed(_SEED)
  with _quiet():
    return evaluator.evaluate(
      lm,
      loaded,
      limit=options.limit or None,
      bootstrap_iters=_RESAMPLES,
      log_samples=log_samples,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Suppresses log messages and warnings of the harness and its dependencies."""
  logger = logging.getLogger('lm_eval')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logger.setLevel(level)


@functools.lru_cache(maxsize=1)  # runs of one process, and a run's three evaluations, open tasks once
def _open(names: tuple[tuple[str, int | None], ...], tasks_path: str) -> tuple[list[str], dict[str, Any]]:
  """(names in the harness's results, argument of `evaluate`) for tasks with their numbers of examples."""
  manager = _manager(tasks_path)
  tasks, scored = list[Any](), list[str]()
  for name, shots in names:
    with _quiet(), reading(f'evaluate.tasks: {name!r}', remedy=_remedy(name, manager)):
      loaded = manager.load(name)
    for key, task in loaded['tasks'].items():
      if getattr(task, 'UNSAFE_CODE', False) or getattr(task, 'MULTIMODAL', False):
        raise InputError(f'evaluate.tasks: {key} runs code of the model, or needs images: leave it out')
      if shots is not None or task.get_config('num_fewshot') is None:
        task.set_config('num_fewshot', shots or 0)
    group = loaded['groups'].get(name)
    tasks += [group] if group else loaded['tasks'].values()
    # A tag or a group without a mean has no score of its own; its tasks have scores.
    scored += [name] if group and group.aggregate_metric_list else loaded['tasks']
  with _quiet(), reading('evaluate.tasks', remedy='name each task once'):  # not by itself and in a group
    return list(dict.fromkeys(scored)), manager.load(tasks)


def _remedy(name: str, manager: Any) -> str:
  if name in (known := set(manager.all_tasks)):
    return (
      'its data comes from the hub; without access, write a task file for local data '
      '(docs/evaluation.md) and set evaluate.tasks_path to its directory'
    )
  close = ', '.join(difflib.get_close_matches(name, known, 4))
  return f'try {close}' if close else '`lm-eval ls tasks` lists all'


@functools.lru_cache(maxsize=1)
def _manager(tasks_path: str) -> Any:
  """The harness's index of tasks, with the task files of a directory."""
  remedy = "pip install 'adapt-jax[eval]', or leave evaluate.tasks and suite empty"
  with reading('evaluate.tasks', remedy=remedy):
    from lm_eval.tasks import TaskManager
  path = local(tasks_path)
  if tasks_path and not any(path.rglob('*.yaml')):
    raise InputError(f'evaluate.tasks_path = {tasks_path!r}: not a directory with .yaml task files')
  with _quiet(), reading(f'evaluate.tasks_path = {tasks_path!r}', remedy='check the task files'):
    return TaskManager(include_path=str(path) if tasks_path else None)


def _scores(results: dict[str, Any], names: list[str]) -> TaskScores:
  scores: TaskScores = {}
  for name in names:
    entry: dict[str, Any] = {}
    for key, value in results['results'][name].items():
      metric, _, kind = key.partition(',')
      if kind and isinstance(value, (int, float, np.number)):  # 'N/A' if there is no standard error
        entry[metric if kind == 'none' else key] = float(value)
    versions = results['versions']
    scores[name] = entry | {'version': versions.get(name), 'n': results['results'][name]['sample_len']}
  return scores
