"""The short form of commands stands for one command in flags, or is refused."""

import pytest

from adapt_jax.cli_help import written_out
from adapt_jax.models.errors import InputError

SHORT = {
  'prune M a.txt --target=0.75 --debug': (
    '--mode=prune --config.model.source=M --config.prune.calibration.source=a.txt '
    '--config.prune.target=0.75 --debug --workdir=out/prune'
  ),
  'accel M --train.source=a.txt --tokens=9 --workdir=w': (
    '--mode=accel --config.model.source=M --config.train.source=a.txt --config.train.tokens=9 --workdir=w'
  ),
  'recover M a.txt --config=demo': (
    '--mode=recover --config=demo --config.model.source=M --config.train.source=a.txt --workdir=out/recover'
  ),
  'generate M --prompt=a --prompt=b=c': '--mode=generate --config.model.source=M --prompt=a --prompt=b=c',
  '--mode=prune --config.prune.target=0.75': '--mode=prune --config.prune.target=0.75',
}


@pytest.mark.parametrize('short', SHORT)
def test_a_short_command_is_written_out(short):
  assert written_out(['adapt-jax', *short.split()]) == ['adapt-jax', *SHORT[short].split()]


@pytest.mark.parametrize(
  'short,named',
  [
    ('prun M', 'did you mean prune?'),
    ('prune M a.txt b.txt', 'b.txt'),
    ('prune M --workdir out', '--workdir'),
    ('prune M -target=9', '-target=9'),
    ('prune M --mode=generate', 'twice'),
    ('prune M --config.model.source=N', 'twice'),
    ('prune M --length=9', '--prune.calibration.length, --evaluate.length'),
  ],
)
def test_an_ambiguous_short_command_is_refused(short, named):
  with pytest.raises(InputError, match=named):
    written_out(['adapt-jax', *short.split()])
