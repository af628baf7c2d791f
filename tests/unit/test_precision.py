"""The dtype of training: measured once, and kept by the run that began with it."""

from adapt_jax.config.build import from_dict
from adapt_jax.modes.accel import ACCEL
from adapt_jax.pipeline.dense_model import with_training_dtype
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.training import precision


def chosen(workdir, **options):
  return with_training_dtype(from_dict(options), str(workdir)).train.dtype


def test_a_run_trains_in_what_it_began_with(tmp_path, monkeypatch):
  """Also where another dtype is faster."""
  begun = with_training_dtype(from_dict({'train': {'dtype': 'bfloat16'}}), '')
  with Workdir(str(tmp_path / 'out'), ACCEL.identity(begun)).claimed():
    pass
  for speed, fastest in ((1.2, 'float32'), (1.3, 'bfloat16')):
    monkeypatch.setattr(precision, 'speedup', lambda speed=speed: speed)
    assert chosen(tmp_path / 'out') == 'bfloat16'
    assert chosen(tmp_path / 'new') == fastest
    assert chosen(tmp_path / 'new', model={'dtype': 'float32'}) == 'float32'
