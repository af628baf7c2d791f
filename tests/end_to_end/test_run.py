"""The main job end to end on a tiny model: report, compiles, bits, resume."""

import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.config.build import from_dict
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import accel, evaluate, export
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.quality import Quality
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.training.rate import with_rate
from tests.support import runs


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return runs.make_files(tmp_path_factory.mktemp('files'))


def start(config, path, mode='accel'):
  options = from_dict(config.to_dict())
  if mode == 'prune':
    options = dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))
  workdir = Workdir(str(path), MODES[mode].identity(options))
  workdir.check()
  accel.run(options, workdir, 'python main.py')
  return json.loads(workdir.report.read_text())


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'out'
  return path, start(runs.make_config(files), path)


def test_report_keeps_the_output_contract(finished):
  path, report = finished
  assert set(report['model']) >= {'params_before', 'params_after', 'params_target'}
  assert set(report['perplexity']) >= {'dense', 'pruned', 'recovered'}
  assert [s['stage'] for s in report['stages']] == [1, 2]
  for stage in report['stages']:
    assert set(stage) == {
      'stage', 'target', 'params', 'perplexity_pruned', 'perplexity_recovered', 'tokens', 'seconds',
      'num_heads', 'num_kv_heads', 'ffn', 'texts',
    }  # fmt: skip
    assert 0 <= stage['target'] - stage['params'] < 3 * runs.HIDDEN
    assert all(n == 2 * k for n, k in zip(stage['num_heads'], stage['num_kv_heads'], strict=True))
  assert report['model']['params_after'] == report['stages'][-1]['params']
  assert report['model']['params_target'] == int(0.8 * report['model']['params_before'])
  assert sum(s['tokens'] for s in report['stages']) == runs.TOKENS
  assert report['stages'][0]['tokens'] < report['stages'][1]['tokens']  # split: linear
  assert {p.name for p in path.iterdir()} == {
    'hf', 'checkpoints', 'report.html', 'plan.json', 'metrics.jsonl', 'run.json', 'report.json',
  }  # fmt: skip


def test_one_scoring_compile_a_run_and_one_training_compile_a_stage(finished):
  _, report = finished
  assert report['compiles']['scoring'] == report['compiles']['compensation'] == 1
  assert report['compiles']['training'] == 2
  assert report['compiles']['evaluation'] == 3  # dense, and each stage's shape


def test_training_recovers(finished):
  _, report = finished
  assert report['perplexity']['recovered'] < 0.9 * report['perplexity']['pruned']


def test_saved_weights_have_the_reported_size_and_perplexity(finished, files, tmp_path):
  path, report = finished
  source = open_source(str(path / 'hf'))
  assert count_params(source.config) == report['model']['params_after']
  assert [s.ffn for s in source.config.layers] == report['stages'][-1]['ffn']
  config = runs.make_config(files)
  config.model.source = str(path / 'hf')
  options = from_dict(config.to_dict())
  workdir = Workdir(str(tmp_path / 'evaluate'), {'mode': 'evaluate'})
  evaluate.run(options, workdir, '')
  again = json.loads(workdir.report.read_text())['perplexity']['dense']
  assert again == pytest.approx(report['perplexity']['recovered'], rel=1e-5)


def test_each_text_is_measured_apart(files, tmp_path, capsys):
  """The first one is what the report's old keys tell; all are in the table, on the page and in the card."""
  config = runs.make_config(files)
  config.evaluate.source = (f'valid={files / "valid.txt"}', f'train={files / "train.txt"}')
  config.evaluate.max_tokens = 640
  report = start(config, tmp_path / 'out')
  assert list(report['texts']) == ['valid', 'train']
  for text in report['texts'].values():
    assert set(text) == {'dense', 'pruned', 'recovered', 'kl', 'definition'} and 0 < text['kl'] < 10
    assert text['recovered'] < text['pruned'] and ' 20 ' in text['definition']
  valid = report['texts']['valid']
  assert all(report['perplexity'][key] == valid[key] for key in report['perplexity'])
  assert report['texts']['train']['pruned'] != valid['pruned']
  assert report['compiles']['divergence'] == 2 and report['compiles']['evaluation'] == 3
  assert [example['text'] for example in report['examples']] == ['valid', 'train']
  assert all(example['prompt'] and example['dense'] for example in report['examples'])
  assert 'examples' not in json.loads((tmp_path / 'out/hf/lineage.json').read_text())
  for stage in report['stages']:
    assert stage['perplexity_pruned'] == stage['texts']['valid']['pruned']
    assert set(stage['texts']['train']) == {'pruned', 'recovered'}
  log = [json.loads(x) for x in (tmp_path / 'out/metrics.jsonl').read_text().splitlines()]
  seen = [(row['of'], row['stage'], row['text']) for row in log if row['event'] == 'evaluate']
  stations = [('dense', 0)] + [(of, stage) for stage in (1, 2) for of in ('pruned', 'recovered')]
  assert seen == [(*station, name) for station in stations for name in ('valid', 'train')]
  row = f'| train | {report["texts"]["train"]["dense"]:.2f} |'
  assert row in capsys.readouterr().out and row in (tmp_path / 'out/hf/README.md').read_text()
  page = (tmp_path / 'out/report.html').read_text()
  assert 'Perplexity on held-out text: train' in page and 'Excess over the dense model by text' in page


def test_first_stage_is_scored_with_the_weights_held_once(files, tmp_path, monkeypatch):
  """All arrays alive at a pruning step, in bytes of the dense model."""
  config, held = runs.make_config(files), []
  config.prune.stages = 1
  dense = sum(x.nbytes for x in load_file(files / 'model/model.safetensors').values())
  write = MetricsLog.write

  def measure(self, event, **values):
    write(self, event, **values)
    if event == 'prune':
      gc.collect()
      held.append((sum(x.nbytes for x in jax.live_arrays()) - before) / dense)

  monkeypatch.setattr(MetricsLog, 'write', measure)
  gc.collect()
  before = sum(x.nbytes for x in jax.live_arrays())
  start(config, tmp_path / 'out', 'prune')
  assert len(held) > 3 and min(held) >= 1 and max(held) < 1.1


def test_plan_tells_what_was_kept_in_the_original_numbering(files, tmp_path):
  """Pruning alone: the saved weights are the source's rows at the plan's indices; none are corrected."""
  config = runs.make_config(files)
  config.prune.compensate = 'none'
  report = start(config, tmp_path / 'out', mode='prune')
  assert report['perplexity']['recovered'] is None and report['compiles']['training'] == 0
  plan = json.loads((tmp_path / 'out/plan.json').read_text())
  before = load_file(files / 'model/model.safetensors')
  after = load_file(tmp_path / 'out/hf/model.safetensors')
  for i, layer in enumerate(plan['layers']):
    name = f'model.layers.{i}.mlp.down_proj.weight'
    np.testing.assert_array_equal(after[name], before[name][:, layer['ffn_channels']])
    name = f'model.layers.{i}.self_attn.q_proj.weight'
    rows = before[name].reshape(3, -1, runs.HIDDEN)[layer['kv_groups']]
    np.testing.assert_array_equal(after[name], rows.reshape(-1, runs.HIDDEN))


def test_compensation_reads_the_rows_that_the_last_step_scored(files, tmp_path, monkeypatch):
  draw, drawn = Pruner._draw, []
  monkeypatch.setattr(Pruner, '_draw', lambda self, step: drawn.append(draw(self, step)) or drawn[-1])
  config = runs.make_config(files)
  config.prune.stages = 1
  start(config, tmp_path / 'out', mode='prune')
  assert len(drawn) > 2 and np.array_equal(drawn[-1], drawn[-2]) and not np.array_equal(drawn[-2], drawn[-3])


@pytest.mark.parametrize('compensate', ['least_squares', 'bias'])
def test_compensated_weights_are_saved_and_better(files, tmp_path, compensate):
  """Without training; what is not an output projection keeps its bits, and biases are exported."""
  perplexity = {}
  for kind in ('none', compensate):
    config = runs.make_config(files)
    config.prune.method, config.prune.stages, config.prune.compensate = 'flap', 1, kind
    report = start(config, tmp_path / kind, mode='prune')
    perplexity[kind] = report['perplexity']['pruned']
    before = count_params(open_source(str(files / 'model')).config)
    model, target = report['model'], int(before * config.prune.target)
    assert model['params_before'] == before and model['params_after'] <= model['params_target'] == target
  assert perplexity[compensate] < perplexity['none']
  plain, ours = (load_file(tmp_path / kind / 'hf/model.safetensors') for kind in ('none', compensate))
  changed = {name for name in plain if not np.array_equal(plain[name], ours[name])}
  outputs = {name for name in plain if name.endswith(('o_proj.weight', 'down_proj.weight'))}
  if compensate == 'least_squares':
    # In the first layers nothing may have gone yet: there is nothing to correct.
    assert len(changed) > len(outputs) // 2 and changed <= outputs
  biases = {name.replace('.weight', '.bias') for name in outputs} if compensate == 'bias' else set()
  assert ours.keys() - plain.keys() == biases
  again = open_source(str(tmp_path / compensate / 'hf'))
  assert count_params(again.config) == report['model']['params_after']


def test_finished_run_started_again_does_nothing(finished, files, capsys):
  path, _ = finished
  before = {p: p.stat().st_mtime_ns for p in path.rglob('*')}
  result = runs.main(files, path)
  assert result.returncode == 0 and 'finished' in result.stdout
  assert {p: p.stat().st_mtime_ns for p in path.rglob('*')} == before


def test_what_changes_memory_or_forms_alone_is_no_part_of_a_runs_identity(files):
  """A run may go on with other devices, smaller batches at once there, and other forms of its result."""
  config = runs.make_config(files)
  before = MODES['accel'].identity(from_dict(config.to_dict()))
  config.mesh.update(data=2, fsdp=1)
  config.train.update(micro_batch=1, remat=True, save_every=1)
  config.prune.calibration.batch = config.evaluate.batch = 1
  config.data.cache = str(files / 'elsewhere')
  config.export.update(formats=('gguf',), gguf_types=('F16',))
  assert MODES['accel'].identity(from_dict(config.to_dict())) == before
  config.train.batch = 2
  assert MODES['accel'].identity(from_dict(config.to_dict())) != before


def test_another_config_in_the_same_workdir_is_refused(finished, files):
  path, _ = finished
  result = runs.main(files, path, '--config.train.lr=0.5')
  assert result.returncode == 2
  assert 'train.lr' in result.stderr and '0.5' in result.stderr and len(result.stderr.splitlines()) == 1


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(files, tmp_path):
  config = runs.make_config(files)
  config.train.lr, config.train.min_lr, config.train.clip = 1.0, 1.0, 1e12
  config.train.warmup = 0.0
  config.model.source = str(runs.make_overflowing_model(files))
  line = r'training step \d+: loss \S+, gradient norm (inf|nan): lower train\.lr = 1\.0 and start a new'
  with pytest.raises(InputError, match=line):
    start(config, tmp_path / 'out')
  assert [p.name for p in (tmp_path / 'out/checkpoints').iterdir() if p.name.isdigit()]
  assert not (tmp_path / 'out/hf').exists() and not (tmp_path / 'out/report.json').exists()


def test_at_the_end_only_the_pruned_model_is_on_the_devices(files, tmp_path, monkeypatch):
  """There the dense model is loaded again, in the place of the teacher and the optimizer's moments."""
  gc.collect()
  before, held, compare = sum(x.nbytes for x in jax.live_arrays()), [], Quality.compare_with_dense

  def noted(self, config, params):
    gc.collect()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    held.append((sum(x.nbytes for x in jax.live_arrays()) - before) / weights)
    return compare(self, config, params)

  monkeypatch.setattr(Quality, 'compare_with_dense', noted)
  config = runs.make_config(files)
  config.train.distill.alpha = 1.0
  start(config, tmp_path / 'out')
  assert len(held) == 1 and held[0] < 1.5


def test_distillation_and_accumulation_and_remat_run_on_chats_and_text(files, tmp_path):
  """Of a tokenizer without a template, whose export then has the one that the run was trained with."""
  config = runs.make_config(files)
  shutil.copytree(files / 'model', tmp_path / 'base')
  (tmp_path / 'base/chat_template.jinja').unlink()
  config.model.source, config.data.chat_template = str(tmp_path / 'base'), 'plain'
  lines = (files / 'train.txt').read_text().splitlines()[:300]
  rows = [json.dumps({'instruction': 'the union?', 'output': line}) for line in lines]
  (tmp_path / 'chats.jsonl').write_text('\n'.join(rows))
  config.train.source = (str(tmp_path / 'chats.jsonl'), str(files / 'train.txt'))
  config.train.weights = (3.0, 1.0)
  config.prune.stages, config.train.micro_batch, config.train.remat = 1, 2, True
  config.train.distill.alpha = 0.5
  report = start(config, tmp_path / 'out')
  assert report['perplexity']['recovered'] < report['perplexity']['pruned']
  assert "'Assistant: '" in open_source(str(tmp_path / 'out/hf')).load_tokenizer().chat_template


def test_bfloat16_compute_trains_fp32_master_weights(files, tmp_path):
  config = runs.make_config(files)
  config.prune.stages, config.model.dtype = 1, 'bfloat16'
  config.model.source = str(files / 'bfloat16')
  report = start(config, tmp_path / 'out')
  assert report['perplexity']['recovered'] < report['perplexity']['pruned']
  saved = load_file(tmp_path / 'out/hf/model.safetensors')
  assert {str(x.dtype) for x in saved.values()} == {'bfloat16'}  # as in the source


def test_a_bfloat16_first_moment_survives_a_kill(files, tmp_path, monkeypatch):
  config = runs.make_config(files)
  config.prune.stages, config.train.mu_dtype = 1, 'bfloat16'
  report = start(config, tmp_path / 'whole')
  assert report['perplexity']['recovered'] < report['perplexity']['pruned']
  with monkeypatch.context() as broken, pytest.raises(InputError, match='killed'):
    runs.steps_of(broken, 23)  # saved after step 21
    start(config, tmp_path / 'out')
  taken = runs.steps_of(monkeypatch)
  assert start(config, tmp_path / 'out')['perplexity'] == report['perplexity']
  assert taken == [22, 23, 24]


def test_pruned_model_can_be_pruned_again(finished, files, tmp_path):
  path, report = finished
  config = runs.make_config(files)
  config.model.source = str(path / 'hf')
  again = start(config, tmp_path / 'out', mode='prune')
  assert again['model']['params_before'] == report['model']['params_after']
  assert again['model']['params_after'] <= int(0.8 * again['model']['params_before'])


def test_the_learning_rate_follows_from_the_weights(files, tmp_path):
  """Where none is given; after a kill it is the same, also in an export of the unfinished run."""
  config = runs.make_config(files)
  config.train.lr = config.train.min_lr = -1.0
  config.prune.stages, config.train.tokens, config.prune.compensate = 1, 10 * 4 * 32, 'none'
  path = tmp_path / 'out'
  report = start(config, path)
  options = from_dict(config.to_dict())
  expected = with_rate(options.train, open_source(str(files / 'model')).stored_params())
  assert report['train']['lr'] == expected.lr > 0 and report['train']['min_lr'] == expected.min_lr
  rates = [e['learning_rate'] for e in MetricsLog(path / 'metrics.jsonl').read() if e['event'] == 'train']
  np.testing.assert_allclose([max(rates), rates[-1]], [expected.lr, expected.min_lr], rtol=1e-6)
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  config.model.source = str(path)
  workdir = Workdir(str(tmp_path / 'export'), {})
  export.run(from_dict(config.to_dict()), workdir, 'python main.py')
  assert json.loads(workdir.report.read_text())['train']['lr'] == expected.lr


def test_reset_optimizer_state_differs_from_carried(finished, files, tmp_path):
  config = runs.make_config(files)
  config.train.optimizer_state = 'reset'
  report = start(config, tmp_path / 'out')
  carried = finished[1]
  assert report['stages'][0]['perplexity_recovered'] == carried['stages'][0]['perplexity_recovered']
  assert report['perplexity']['recovered'] != carried['perplexity']['recovered']


def unfinish(path):
  """Takes back the end of a run, so that it resumes from its newest checkpoint."""
  (path / 'report.json').unlink()
  return path


def test_prune_mode_resumes_a_model_of_mixed_dtypes(files, tmp_path):
  """Norms in float32 beside bfloat16 matrices, as llama.cpp stores them: dtypes survive, restart works."""
  config = runs.make_config(files)
  config.model.source = str(tmp_path / 'mixed')
  shutil.copytree(files / 'bfloat16', tmp_path / 'mixed')
  tensors = load_file(tmp_path / 'mixed/model.safetensors')
  mixed = {k: v.astype(np.float32) if 'norm' in k else v for k, v in tensors.items()}
  save_file(mixed, tmp_path / 'mixed/model.safetensors', metadata={'format': 'pt'})
  start(config, tmp_path / 'out', mode='prune')
  first = (tmp_path / 'out/hf/model.safetensors').read_bytes()
  saved = load_file(tmp_path / 'out/hf/model.safetensors')
  assert {str(v.dtype) for k, v in saved.items() if 'norm' in k} == {'float32'}
  assert {str(v.dtype) for k, v in saved.items() if 'norm' not in k} == {'bfloat16'}
  unfinish(tmp_path / 'out')
  start(config, tmp_path / 'out', mode='prune')
  assert (tmp_path / 'out/hf/model.safetensors').read_bytes() == first


@pytest.mark.parametrize('damage', ['meta', 'state', 'plan', 'edited plan'])
def test_damaged_state_is_one_line_that_tells_what_to_delete(finished, files, tmp_path, damage):
  path = tmp_path / 'out'
  shutil.copytree(finished[0], path)
  unfinish(path)
  newest = max((p for p in (path / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  if damage == 'plan':
    (path / 'plan.json').write_text('{')
    culprit = path / 'plan.json'
  elif damage == 'edited plan':
    culprit = path / 'plan.json'
    plan = json.loads(culprit.read_text())
    plan['layers'][0]['ffn_channels'].pop()
    culprit.write_text(json.dumps(plan))
  else:
    culprit = newest
    for file in (newest / damage).rglob('*'):
      if file.is_file():
        file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(InputError) as error:
    start(runs.make_config(files), path)
  assert str(culprit) in str(error.value) and 'delete' in str(error.value)
  if 'plan' not in damage:
    shutil.rmtree(newest)
    report = start(runs.make_config(files), path)  # goes on from the one before, to the same end
    assert report['perplexity'] == finished[1]['perplexity']


def test_a_text_that_has_changed_since_the_start_is_refused(finished, files, tmp_path):
  path = tmp_path / 'out'
  shutil.copytree(finished[0], path)
  unfinish(path)
  source = files / 'valid.txt'
  before = source.read_text()
  try:
    source.write_text(before.replace('a', 'e', 1))
    with pytest.raises(InputError, match=r'evaluate\.source is not what the run'):
      start(runs.make_config(files), path)
  finally:
    source.write_text(before)
  report = start(runs.make_config(files), path)
  assert report['perplexity'] == finished[1]['perplexity']


def test_training_is_saved_before_it_is_measured(files, tmp_path, monkeypatch):
  """Tasks may take hours, and fail."""
  config, path, measure = runs.make_config(files), tmp_path / 'out', Quality.perplexity
  config.prune.stages, config.train.save_every = 1, 10**6

  def fail(self, config, params, of, *args):
    if of == 'recovered':
      raise InputError('out of memory')
    return measure(self, config, params, of, *args)

  taken = runs.steps_of(monkeypatch)
  with monkeypatch.context() as broken, pytest.raises(InputError, match='out of memory'):
    broken.setattr(Quality, 'perplexity', fail)
    start(config, path)
  assert len(taken) == 24
  start(config, path)
  assert len(taken) == 24


def test_other_weights_of_the_same_name_are_refused_on_a_resume(finished, files, tmp_path):
  """A half-trained student would go on with another teacher."""
  path = tmp_path / 'out'
  shutil.copytree(finished[0], path)
  unfinish(path)
  weights = files / 'model/model.safetensors'
  before = weights.read_bytes()
  try:
    save_file({name: 2 * array for name, array in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match=r'model\.source is not what the run'):
      start(runs.make_config(files), path)
  finally:
    weights.write_bytes(before)


def test_prune_mode_reports_the_perplexity_of_the_saved_weights(files, tmp_path):
  config = runs.make_config(files)
  config.export.dtype = 'bfloat16'
  report = start(config, tmp_path / 'out', mode='prune')
  config.model.source = str(tmp_path / 'out/hf')
  workdir = Workdir(str(tmp_path / 'evaluate'), {'mode': 'evaluate'})
  evaluate.run(from_dict(config.to_dict()), workdir, '')
  again = json.loads(workdir.report.read_text())['perplexity']['dense']
  assert again == pytest.approx(report['perplexity']['pruned'], rel=1e-6)
