"""The loop of recovery training."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import bytes_of, put_rows
from adapt_jax.machine.processes import decide, say
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.training import remat
from adapt_jax.training.optim import learning_rate
from adapt_jax.training.step import Teacher, TrainingStep, TrainState, batch_shapes

Metrics = dict[str, float]


class Data(Protocol):
  """Rows of training, such as a `TrainSet`: which rows a step takes, and their arrays (`batch_shapes`)."""

  def rows(self, step: int) -> np.ndarray: ...

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]: ...


class Diverged(InputError):
  """The loss or the gradient norm of a training step is not finite."""


class Trained(NamedTuple):
  """A finished training step.

  step: number of finished steps of the whole run. metrics: those of this step.
  state: the state after it, if it is to be saved; None if it was already donated to the next step.
  """

  step: int
  metrics: Metrics
  state: TrainState | None


def recover_model(
  config: ModelConfig,
  state: TrainState,
  data: Data,
  options: TrainOptions,
  optimizer: optax.GradientTransformation,
  *,
  stop: int,
  total: int,
  dtype: Any,
  compiler: Compiler,
  start: int = 0,
  teacher: Teacher | None = None,
  title: str = 'recover',
  name: str = 'training',
  beside: int | None = None,
) -> Iterator[Trained]:
  """Compiles the training step of a model, and returns the steps start … stop-1, as `run_steps` yields them.

  config: of the parameters in `state`, which is donated. total: steps of the whole run, for the schedule of
  the learning rate. dtype: of activations. compiler: counts the compiles as `name`; more than one, if the
  first program does not fit the devices (`training.remat`) beside `beside` bytes (None: what is in use there
  beside its arguments).
  """
  teachers = (teacher.params,) if teacher else ()

  def compile(options: TrainOptions) -> Any:
    step = TrainingStep(config, options, optimizer, dtype, teacher.config if teacher else None)
    return compiler(name, step, state, batch_shapes(options), *teachers, donate_argnums=(0,))

  others = remat.others(state, *teachers) if beside is None else beside
  room, held = decide(remat.memory), bytes_of((state, *teachers)) + others

  def fit(program: Any) -> bool:
    return bool(decide(lambda: remat.fits(remat.planned(program) + others, room)))

  def likely(form: TrainOptions) -> bool:
    return remat.fits(remat.expected(config, form, dtype, held), room)

  asked = options
  options, program = remat.chosen(asked, compile, fit, likely if room else None)
  if room and options != asked:
    gb = (remat.planned(program) + others) / 1e9
    say(
      f'{title}: {options.micro_batch} rows at once on a device{", with remat" * (options.remat == "True")}: '
      f'{gb:.1f} of {room / 1e9:.1f} GB (train.micro_batch, train.remat)'
    )
  return run_steps(
    state, program, data, options, start=start, stop=stop, total=total, teacher=teacher, title=title
  )


def run_steps(
  state: TrainState,
  program: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  data: Data,
  options: TrainOptions,
  *,
  start: int,
  stop: int,
  total: int,
  teacher: Teacher | None,
  title: str,
) -> Iterator[Trained]:
  """Runs the global steps start … stop-1; yields each when it has finished. Donates `state`.

  Metrics are read one step late, so the device does not wait for the host. The state is included every
  `options.save_every` steps, at the end and after SIGTERM, once its loss is known to be finite. Raises
  `Preempted` after SIGTERM, and `Diverged`, naming the step, if loss or gradient norm is not finite.
  """
  # On the host before the first step: a later computation would wait for the steps that are on the device.
  rates = np.asarray(learning_rate(options, total)(np.arange(total)))
  tokens_per_step = options.batch * options.length
  teachers = (teacher.params,) if teacher else ()
  pending: tuple[int, dict[str, jax.Array]] | None = None
  since = time.monotonic()  # when the step before `pending` finished, as seen by the host

  def read(step: int, device_metrics: dict[str, jax.Array]) -> Metrics:
    nonlocal since
    metrics = {k: float(v) for k, v in device_metrics.items()}
    if not math.isfinite(metrics['loss']) or not math.isfinite(metrics['gradient_norm']):
      raise Diverged(
        f'training step {step + 1}: loss {metrics["loss"]}, gradient norm {metrics["gradient_norm"]}: '
        f'lower train.lr = {options.lr}'
      )
    seconds, since = time.monotonic() - since, time.monotonic()
    progress.update(tokens_per_step, loss=f'{metrics["loss"]:.3f}')
    return metrics | {
      'learning_rate': float(rates[step]),
      'tokens_per_second': tokens_per_step / max(seconds, 1e-9),
    }

  with Progress(title, (stop - start) * tokens_per_step, 'tokens') as progress:
    for step in range(start, stop):
      state, device_metrics = program(state, put_rows(data.rows(step), data.read), *teachers)
      if pending is not None:
        yield Trained(pending[0] + 1, read(*pending), None)
      pending = step, device_metrics
      stopping = preemption.requested()
      if stopping or step + 1 == stop or (step + 1) % options.save_every == 0:
        yield Trained(step + 1, read(*pending), state)
        pending, since = None, time.monotonic()
      if stopping:
        raise preemption.Preempted
