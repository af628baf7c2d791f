"""Mode export: from a checkpoint, a finished run and one that is not, in the forms asked for."""

import json
import shutil
import time

import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import adapt_jax as aj
from adapt_jax.export.hf import write_hf
from adapt_jax.export.writer import LINEAGE, lineage
from adapt_jax.machine import preemption
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_config, open_source
from adapt_jax.modes import export as export_mode
from adapt_jax.pipeline import checkpoint
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.run import Run
from tests.support import runs
from tests.support.helpers import UNIFORM, random_params, refused, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer


def export(files, source, path, **fields):
  config = runs.make_config(files)
  config.model.source = str(source)
  for field, value in fields.items():
    config.export[field] = value
  return runs.in_process(config, path, 'export', 'python main.py --mode=export')


def assert_same_weights(path, reference):
  a, b = (load_file(p / 'model.safetensors') for p in (path, reference))
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def test_a_checkpoint_keeps_every_bit(files, tmp_path, monkeypatch):
  monkeypatch.setattr(export_mode, 'load_source', None)  # it stays in its files
  report = export(files, files / 'bfloat16', tmp_path / 'out')
  assert_same_weights(tmp_path / 'out/hf', files / 'bfloat16')
  assert report['exports']['hf']['logit_difference'] == 0
  assert report['exports']['hf']['type'] == 'bfloat16'


def test_a_quantised_source_is_written_as_bfloat16_and_measured_so(files, tmp_path):
  export(files, files / 'model', tmp_path / 'small', formats=('gguf',), gguf_types=('Q8_0',))
  source = tmp_path / 'small/gguf/model-Q8_0.gguf'
  assert export(files, source, tmp_path / 'out')['exports']['hf']['type'] == 'bfloat16'
  config = runs.make_config(files)
  config.model.source = str(source)
  report = runs.in_process(config, tmp_path / 'pruned', 'prune')
  assert open_source(str(tmp_path / 'pruned/hf')).dtype == 'bfloat16'
  config.model.source = str(tmp_path / 'pruned/hf')
  again = runs.in_process(config, tmp_path / 'again', 'evaluate')['perplexity']['dense']
  assert again == pytest.approx(report['perplexity']['pruned'], rel=1e-6)


def test_a_workdir_stands_for_its_model_and_origin(files, finished, tmp_path):
  report = export(files, finished, tmp_path / 'out', dtype='bfloat16')
  ran = runs.read_report(finished)
  for path in (finished, tmp_path / 'out'):
    lineage = json.loads((path / 'hf' / LINEAGE).read_text())
    assert lineage['stages'] == ran['stages'] and lineage['command'] == 'python main.py'
  assert report['command'] == 'python main.py --mode=export' and report['stages'] == ran['stages']
  source = open_source(str(tmp_path / 'out'))
  assert source.dtype == 'bfloat16' and count_params(source.config) == ran['model']['params_after']
  assert open_config(str(finished)) == source.config


@pytest.fixture()
def unfinished(finished, tmp_path):
  """As a kill before the export leaves it."""
  path = tmp_path / 'unfinished'
  shutil.copytree(finished, path)
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  return path


def test_a_run_that_is_not_finished_is_taken_at_its_newest_checkpoint(
  files, finished, unfinished, tmp_path, caplog
):
  before = {p: p.stat().st_mtime_ns for p in unfinished.rglob('*') if p.is_file()}
  report = export(files, unfinished, tmp_path / 'out')
  assert_same_weights(tmp_path / 'out/hf', finished / 'hf')
  ran = runs.read_report(finished)
  assert report['stages'] == ran['stages'] and report['model']['params_after'] == ran['model']['params_after']
  for name in ('prune', 'train', 'data'):
    assert report[name] == ran[name]
  assert report['perplexity']['dense'] == ran['perplexity']['dense']
  assert not caplog.records, caplog.text  # orbax has notices about what it only reads
  # The run may go on meanwhile: nothing of it is touched.
  assert {p: p.stat().st_mtime_ns for p in unfinished.rglob('*') if p.is_file()} == before


def test_a_run_without_a_checkpoint_is_one_line(files, unfinished, tmp_path):
  shutil.rmtree(unfinished / 'checkpoints')
  (unfinished / 'checkpoints').mkdir()
  assert 'no complete checkpoint' in refused(export, files, unfinished, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_form_that_cannot_hold_the_model_is_refused_before_anything_is_written(files, tmp_path):
  config = tiny_config('llama', UNIFORM, vocab_size=320, output_bias=True)
  write_hf(config, random_params(config), tmp_path / 'biased', tokenizer=tiny_tokenizer())
  formats = {'formats': ('hf', 'hf_padded')}
  assert "'hf_padded'" in refused(export, files, tmp_path / 'biased', tmp_path / 'out', **formats)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('beside', [False, True])
def test_a_run_stopped_during_training_has_no_figures_of_what_it_was_before(
  files, tmp_path, monkeypatch, beside
):
  """Also where the last checkpoint is written beside training: the run ends after it."""
  stopped, write = [], MetricsLog.write
  if beside:
    finalize = ocp.StandardCheckpointHandler.finalize
    slowly = lambda self, path: time.sleep(0.5) or finalize(self, path)  # noqa: E731
    monkeypatch.setattr(ocp.StandardCheckpointHandler, 'finalize', slowly)
    monkeypatch.setattr(checkpoint, 'on_cpu', lambda: False)

  def noted(self, event, **fields):
    write(self, event, **fields)
    if event == 'train' and fields['step'] == 3:
      stopped.append(True)

  monkeypatch.setattr(MetricsLog, 'write', noted)
  monkeypatch.setattr(preemption, 'requested', lambda: bool(stopped))
  scores = {'task': {'acc': 1.0, 'n': 1}}
  monkeypatch.setattr(Run, '_measure_tasks', lambda self, state, c, p, of: state.record_tasks(of, scores))
  config = runs.make_config(files)
  with pytest.raises(preemption.Preempted):
    runs.in_process(config, tmp_path / 'run')
  report = export(files, tmp_path / 'run', tmp_path / 'out')
  (stage,) = report['stages']
  assert stage['tokens'] >= 3 * 128 and stage['tokens'] % 128 == 0
  assert report['perplexity']['pruned'] is None and set(report['tasks']) == {'dense'}


def test_a_lineage_of_other_weights_is_not_taken(files, finished, tmp_path, capsys):
  """As after a file was copied beside those of an export."""
  (tmp_path / 'mixed').mkdir()
  for path in (files / 'model').iterdir():
    shutil.copy(path, tmp_path / 'mixed')
  assert lineage(open_source(str(finished)))['command'] == 'python main.py'
  shutil.copy(finished / 'hf' / LINEAGE, tmp_path / 'mixed')
  assert lineage(open_source(str(tmp_path / 'mixed'))) is None
  assert 'is of other weights' in capsys.readouterr().out


def test_pruning_an_export_again_keeps_its_origin(files, finished, tmp_path):
  config = runs.make_config(files)
  config.model.source, config.prune.stages, config.prune.target = str(finished), 1, 0.9
  config.train.tokens = 0
  report = runs.in_process(config, tmp_path / 'again', 'prune')
  first = runs.read_report(finished)['model']
  assert report['model']['source'] == str(finished)
  assert (report['origin']['source'], report['origin']['params']) == ('model', first['params_before'])
  model = aj.load(tmp_path / 'again/hf')
  assert (model.name, model.dense) == ('model', first['params_before'])
