"""Several processes as one run: how they start and make common decisions.

Every process runs the same program on its own devices and its own rows. Values that depend on one process,
from disk or host arithmetic, are found by the first process and broadcast to all (`decide`), since a process
that took another branch would leave the others waiting. The first process writes the text output.
"""

import contextlib
import contextvars
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint
from jax.experimental import multihost_utils
from tqdm import tqdm

from adapt_jax.models.errors import InputError, Unreachable, first_line, reading

MODES = ('auto', 'on', 'off')
_PATIENCE_MS = 7 * 24 * 3_600_000  # upper limit; a process that has died is detected sooner
_LEAVING_MS = 10_000
WAITS = (0, 1, 10, 60)  # seconds to wait until a shared file system shows what another machine wrote
_decisions = 0
_silent = contextvars.ContextVar('silent', default=False)


class OutputClosed(BaseException):
  """The reader of the output has ended, as in `| head`. Not an OSError: no file was refused."""


def start(mode: str, address: str, processes: int, process: int) -> None:
  """Joins the run's other processes, before any other use of JAX; does nothing for a single process.

  Args:
    mode: auto (detected from the environment of SLURM, Open MPI, Kubernetes or a TPU slice), on (JAX detects
      the processes, or fails), off.
    address, processes, process: host:port of process 0, the number of processes, and the index of this one;
      all three, or '', 0 and -1.

  Raises InputError if only some of the three are given, or the others cannot be reached.
  """
  given = [bool(address), processes > 0, process >= 0]
  if any(given) and not (all(given) and process < processes):
    raise InputError(
      f'--coordinator_address={address} --num_processes={processes} --process_id={process}: give all three, '
      f'the last below the number, or none'
    )
  explicit: dict[str, Any] = {}
  if all(given):
    explicit = {'coordinator_address': address, 'num_processes': processes, 'process_id': process}
    explicit['cluster_detection_method'] = 'deactivate'
  elif mode == 'off' or (mode == 'auto' and not _managed(os.environ)):
    return
  if processes == 1:
    return
  remedy = 'check --coordinator_address, --num_processes and --process_id, or start with --distributed=off'
  with reading('connecting the processes of this run', remedy=remedy):
    jax.distributed.initialize(**explicit)


def _managed(environment: Any) -> bool:
  """Whether a scheduler has started more than one process. SLURM: only inside srun."""

  def count(name: str) -> int:
    return int(value) if (value := environment.get(name, '')).isdecimal() else 0

  slurm = 'SLURM_STEP_NODELIST' in environment and 'SLURM_PROCID' in environment
  return (
    (slurm and count('SLURM_NTASKS') > 1)
    or count('OMPI_COMM_WORLD_SIZE') > 1
    or count('MEGASCALE_NUM_SLICES') > 1
    or len(environment.get('TPU_WORKER_HOSTNAMES', '').split(',')) > 1
    or ('KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment)
  )


def count() -> int:
  """The number of processes, found at the first use of the devices.

  Raises InputError if JAX_PLATFORMS names a platform whose plug-in or driver is missing.
  """
  try:
    return jax.process_count()
  except (AssertionError, RuntimeError) as error:  # the former for cuda, without a message
    reason, asked = str(error), os.environ.get('JAX_PLATFORMS', '')
    missing = not reason or any(x in reason for x in ('known backends', 'libtpu.so', 'initialize backend'))
    missing = missing and 'UNAVAILABLE' not in reason  # busy devices may be free in another attempt
    says = (
      f'JAX_PLATFORMS={asked}: JAX finds no such device{f" ({first_line(error)})" * bool(reason)}: check the '
      f"driver and what the container sees, or pip install 'adapt-jax[cuda]' or 'adapt-jax[tpu]', or unset it"
    )
    raise InputError(says) if missing else error from None


def is_first() -> bool:
  """Whether this is the first process, which writes what is written once."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, once for all processes."""
  if shows():
    write(text)


def write(line: str) -> None:
  """A line on stdout in one piece, above the bars of a terminal."""
  try:
    with tqdm.external_write_mode(file=sys.stdout):
      sys.stdout.write(line + '\n')
      sys.stdout.flush()
  except BrokenPipeError:
    raise OutputClosed from None


def shows() -> bool:
  """Whether this process prints: only the first does, and not inside `silent`."""
  return is_first() and not _silent.get()


@contextlib.contextmanager
def silent(asked: bool = True) -> Iterator[None]:
  """Prints nothing and shows no progress inside the block, if `asked`; for use as a library."""
  token = _silent.set(asked)
  try:
    yield
  finally:
    _silent.reset(token)


def leave(code: int) -> NoReturn:
  """Ends this process without waiting long for other processes, which notice at their next step.

  If all end with the same code, as after bad input, each ends by itself; the first one ends last, because
  JAX ends the remaining ones after it.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(Exception):  # whatever JAX raises if the others do not come
    _barrier(f'leave {code}', _LEAVING_MS)
    time.sleep(1.0 if is_first() else 0.0)
  os._exit(code)  # JAX would first wait for all processes, some of which wait for this one


def explain(error: BaseException) -> None:
  """Says what to do if `error` is one of JAX among several processes.

  Call it where the error is caught, before other work: JAX's heartbeat, which makes a barrier fail, also ends
  this process, some milliseconds later and in words of its own.
  """
  if isinstance(error, jax.errors.JaxRuntimeError) and jax.distributed.is_initialized():
    print(
      'error: this process cannot continue, probably because another one of the run has ended: start all '
      'of them again to resume from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )


def _barrier(name: str, timeout_ms: int) -> None:
  orbax.checkpoint.multihost.get_barrier_sync_fn()(key=name, timeout_ms=timeout_ms)


def decide(find: Callable[[], Any]) -> Any:
  """Returns in all processes what `find` returns in the first: a JSON value; or raises its InputError.

  After any other error, which the first process raises itself, the others raise an InputError too.
  """
  if jax.process_count() == 1:
    return find()
  global _decisions
  _decisions += 1
  told: dict[str, Any] = {}
  failure: BaseException | None = None
  if is_first():
    try:
      told = {'found': find()}
    except InputError as error:
      told = {'error': str(error), 'unreachable': isinstance(error, Unreachable)}
    except (Exception, OutputClosed) as error:
      told, failure = {'error': f'process 0 failed: {first_line(error)}'}, error
  # A collective could time out while the first process tokenises.
  try:
    _barrier(f'decision {_decisions}', _PATIENCE_MS)
  except jax.errors.JaxRuntimeError as error:
    explain(error)
    raise
  told = json.loads(_broadcast(json.dumps(told).encode()))
  if 'error' in told:
    kind = Unreachable if told.get('unreachable') else InputError
    raise failure or kind(told['error'])
  return told['found']


def from_first_process(array: np.ndarray) -> np.ndarray:
  """The first process's array, in all processes, which give arrays of one shape and dtype."""
  if jax.process_count() == 1:
    return array
  return np.frombuffer(_broadcast(array.tobytes()), array.dtype).reshape(array.shape)


def _broadcast(payload: bytes) -> bytes:
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(payload), np.int32)))
  buffer = np.zeros(size, np.uint8)
  if is_first():
    buffer[:] = np.frombuffer(payload, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
