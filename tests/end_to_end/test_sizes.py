"""Several targets in one run: sizes equal lone runs and share work; a kill costs only its own size."""

import re

import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import frontier
from adapt_jax.modes.registry import MODES
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.training import healing
from tests.support import runs

TARGETS = (0.9, '0.7kv', 0.8)


def make_config(files, target=TARGETS):
  config = runs.make_config(files)
  config.prune.update({'method': 'obs', 'compensate': 'least_squares', 'heal': 1, 'target': target})
  config.export.formats = ('hf', 'gguf')
  return config


@pytest.fixture(scope='module')
def sizes(files, tmp_path_factory):
  """The directory of a run that was killed in training its second size, and what it asked of the dense model.

  These are the targets that scored, and 'teacher' where healing asked.
  """
  path, scored = tmp_path_factory.mktemp('sizes') / 'out', []
  compute, predictions = Pruner._compute, healing.predictions

  def counted(self, *args):
    scored.append(self.options.target)
    return compute(self, *args)

  def told(*args, **common):
    scored.append('teacher')
    return predictions(*args, **common)

  config = make_config(files)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(healing, 'predictions', told)
    patch.setattr(Pruner, '_compute', counted)
    with pytest.MonkeyPatch.context() as kill:
      train, seen = runs.Recovery.steps, []

      def steps(self, *args):
        for done in train(self, *args):
          seen.append(done.step)
          yield done
          if len(seen) == 8 + 6:
            raise KeyboardInterrupt

      kill.setattr(runs.Recovery, 'steps', steps)
      with pytest.raises(KeyboardInterrupt):
        runs.in_process(config, path, whole=True)
    assert scored == ['teacher', 0.9] and not (path / 'report.json').exists()
    runs.in_process(config, path, whole=True)
  return path, scored


def test_each_size_is_what_a_run_for_it_alone_gives(sizes, files, tmp_path):
  """To the bit: weights, figures, plan and log, also of the size that was killed and resumed."""
  for target in TARGETS:
    alone = tmp_path / str(target)
    runs.in_process(make_config(files, target), alone)
    runs.assert_same_end(sizes[0] / 'sizes' / str(target), alone)


def test_one_report_has_all_sizes_and_one_pass_of_each_kind_serves_them(sizes):
  path, scored = sizes
  report = runs.read_report(path)
  # Once in each of two processes: the second size was already pruned.
  assert scored == ['teacher', 0.9, 'teacher', 0.8]
  assert [cell['values']['prune.target'] for cell in report['cells']] == list(TARGETS)
  for cell in report['cells']:
    place = path / 'sizes' / cell['name']
    assert cell['bytes'] == (place / 'hf/model.safetensors').stat().st_size
    of_run = runs.read_report(place)
    assert cell['params'] == of_run['model']['params_after']
    assert cell['faster'] == of_run['gain']['result']['decode'] / of_run['gain']['dense']['decode']
    assert {*cell['budget']} >= {'target', 'asked', 'reached'} and not (place / 'checkpoints').exists()
  page = (path / 'report.html').read_text()
  assert '3 of 3 sizes finished' in page and 'sizes/0.7kv/report.html' in page and '<svg' in page


def test_a_size_is_a_model_for_other_modes_and_the_workdir_names_them(sizes, files, tmp_path):
  config = runs.make_config(files)
  config.model.source, config.export.formats = str(sizes[0] / 'sizes/0.8'), ('hf_padded',)
  runs.in_process(config, tmp_path / 'out', 'export')
  assert open_source(str(tmp_path / 'out/hf_padded')).config.uniform
  smaller = frontier._sizes(str(sizes[0]))  # mode frontier takes all of them
  assert smaller == [str(sizes[0] / 'sizes' / name) for name in ('0.9', '0.8', '0.7kv')]
  with pytest.raises(InputError, match=r"give one of its sizes, such as '.*/sizes/0\.7kv'"):
    open_source(str(sizes[0]))


def test_a_bad_size_is_refused_before_any_runs(files, tmp_path):
  with pytest.raises(InputError, match=re.escape('prune.target = 0.05 asks for')):
    runs.in_process(make_config(files, (0.9, 0.05)), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  assert MODES['prune'].uses('prune.target')
