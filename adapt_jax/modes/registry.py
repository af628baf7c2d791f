"""All modes by name, in the order of `--help`. To add one, write its module and list it here."""

from adapt_jax.modes import (
  accel,
  bench,
  compare,
  estimate,
  evaluate,
  export,
  frontier,
  generate,
  narrow,
  recover,
  sensitivity,
  trim,
)
from adapt_jax.modes.mode import Mode

MODES: dict[str, Mode] = {
  mode.name: mode
  for mode in (
    accel.ACCEL,
    accel.PRUNE,
    recover.MODE,
    trim.MODE,
    narrow.MODE,
    evaluate.MODE,
    export.MODE,
    generate.MODE,
    bench.MODE,
    frontier.MODE,
    compare.MODE,
    sensitivity.MODE,
    estimate.MODE,
  )
}
