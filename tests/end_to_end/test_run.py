"""The main job end to end on a tiny model: report, compiles, bits, resume."""

import gc
import json
import pathlib
import re
import shlex
import shutil
import urllib.request

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.config.build import from_dict
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes.last_lines import last_lines
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.quality import Quality
from adapt_jax.pipeline.state import StateStore
from adapt_jax.reports.summary import gain_table, health_lines, table
from adapt_jax.training.healing import Healing
from adapt_jax.training.rate import with_rate
from tests.support import runs
from tests.support.helpers import refused
from tests.support.runs import in_process as start
from tests.support.runs import read_report


@pytest.fixture(scope='module')
def staged(files, tmp_path_factory):
  """A run in two stages, measured on two texts."""
  config, path = runs.in_two_stages(runs.make_config(files)), tmp_path_factory.mktemp('staged') / 'out'
  config.evaluate.source = (f'valid={files / "valid.txt"}', f'train={files / "train.txt"}')
  config.evaluate.max_tokens = 640
  return path, start(config, path)


@pytest.fixture(scope='module')
def pruned(files, tmp_path_factory):
  """{compensation: workdir} of runs without training."""
  paths = {kind: tmp_path_factory.mktemp('pruned') / kind for kind in ('none', 'least_squares', 'bias')}
  for kind, path in paths.items():
    config = runs.make_config(files)
    config.prune.method, config.prune.compensate = 'flap', kind
    start(config, path, 'prune')
  return paths


def measured(files, path, tmp_path):
  """Perplexity of the weights that a run saved."""
  config = runs.make_config(files)
  config.model.source = str(path / 'hf')
  return start(config, tmp_path / 'evaluate', 'evaluate')['perplexity']['dense']


def altered(model, tmp_path, name, factor=1.0):
  """A copy of a model whose weights of such a name are in float32, and larger by a factor."""
  path = shutil.copytree(model, tmp_path / 'altered')
  weights = load_file(path / 'model.safetensors')
  weights |= {key: factor * x.astype(np.float32) for key, x in weights.items() if name in key}
  save_file(weights, path / 'model.safetensors', metadata={'format': 'pt'})
  return path


def unfinished(finished, path):
  """A copy of a run that has come to its last checkpoint and not to its end."""
  shutil.copytree(finished, path)
  (path / 'report.json').unlink()
  return path


def test_report_keeps_the_output_contract(staged):
  path, report = staged
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
  assert sum(s['tokens'] for s in report['stages']) == 2 * runs.TOKENS
  assert report['stages'][0]['tokens'] < report['stages'][1]['tokens']
  assert {p.name for p in path.iterdir()} == {
    'hf', 'report.html', 'plan.json', 'metrics.jsonl', 'run.json', 'report.json', '.lock',
  }  # fmt: skip


def test_one_scoring_compile_a_run_and_one_training_compile_a_stage(staged):
  _, report = staged
  assert report['compiles']['scoring'] == report['compiles']['compensation'] == 1
  assert report['compiles']['training'] == 2
  # Neither the dense model nor the last one is run again for its KL.
  assert report['compiles']['divergence'] == 1
  # Dense, each stage's shape and the loss, whatever the texts.
  assert report['compiles']['evaluation'] == 4


def test_each_text_is_measured_apart(staged):
  """The first one is what the report's old keys tell."""
  _, report = staged
  assert list(report['texts']) == ['valid', 'train']
  for text in report['texts'].values():
    assert 0 < text['kl'] < 10 and text['recovered'] < text['pruned']
  valid = report['texts']['valid']
  assert all(report['perplexity'][key] == valid[key] for key in report['perplexity'])
  assert report['texts']['train']['pruned'] != valid['pruned']
  assert all(stage['perplexity_pruned'] == stage['texts']['valid']['pruned'] for stage in report['stages'])


def test_the_health_of_both_models_is_reported_everywhere(finished):
  report = read_report(finished)
  assert list(report['texts']) == ['text', 'own'] and report['texts']['own']['kl'] > 0
  health = report['health']
  assert health['answers'] == 40 and len(health['examples']) == 4
  assert all(
    0 <= health[of]['repetition'] <= 1 and 0 <= health[of]['usable'] <= 40 for of in ('dense', 'result')
  )
  events = runs.events(finished)
  assert [e['result'] for e in events if e['event'] == 'health'] == [health['result']]
  (line,) = health_lines(health)
  assert line in table(report) and line in (finished / 'report.html').read_text() and len(line) <= 80
  card = (finished / 'hf/README.md').read_text()
  assert f'| result | {health["result"]["usable"]} |' in card and 'own' not in card.split('---')[1]


def test_the_gain_is_reported_everywhere(finished):
  report = read_report(finished)
  gain, model = report['gain'], report['model']
  assert gain['dtype'] == 'float32' and gain['result']['weights'] == 4 * model['params_after']
  assert gain['dense']['weights'] == 4 * model['params_before']
  assert gain['dense']['kv_cache'] == 2 * 4 * 8 * sum(model['num_kv_heads'])  # head_dim 8, 4 bytes
  assert gain['result']['kv_cache'] == 2 * 4 * 8 * sum(report['stages'][-1]['num_kv_heads'])
  assert all(gain[of][speed] > 0 for of in ('dense', 'result') for speed in ('prefill', 'decode'))
  (event,) = [e for e in runs.events(finished) if e['event'] == 'gain']
  assert event['result'] == gain['result']
  rows = gain_table(report).rows
  assert table(report).startswith(f'\n{gain_table(report).markdown()}') and len(rows) == 4
  page, card = (finished / 'report.html').read_text(), (finished / 'hf/README.md').read_text()
  assert all(f'<td>{row[1]}</td><td>{row[2]}</td>' in page for row in rows) and gain['measured'] in page
  assert all(' | '.join(row) in card for row in rows)


def test_the_last_lines_work_when_pasted(finished, tmp_path, monkeypatch, code_cache):
  pytest.importorskip('torch')
  shutil.copytree(finished, tmp_path / 'a run')
  monkeypatch.chdir(tmp_path)
  lines = last_lines(read_report(finished), tmp_path / 'a run', f'python {runs.ROOT / "main.py"}')
  page, answer, load, smaller = map(shlex.split, lines[-4:])
  assert pathlib.Path(urllib.request.url2pathname(page[-1].removeprefix('file://'))).exists()
  assert answer[2:4] == ['generate', 'a run'] and smaller[2:4] == ['export', 'a run']
  for command in (answer, smaller):  # forked from a process that is elsewhere
    done = runs.forks.main([word.replace('a run', f'{tmp_path}/a run') for word in command[1:]])
    assert done.returncode == 0, done.stderr
  predicted = re.search(r'Q8_0 file of about (\d+) MB', lines[1])
  written = (tmp_path / 'a run-Q8_0/gguf/model-Q8_0.gguf').stat().st_size
  assert predicted and float(predicted[1]) <= written / 1e6
  exec(load[2])


def test_saved_weights_have_the_reported_size_and_perplexity(finished, files, tmp_path):
  report = read_report(finished)
  assert report['perplexity']['recovered'] < 0.9 * report['perplexity']['pruned']
  source = open_source(str(finished / 'hf'))
  assert count_params(source.config) == report['model']['params_after']
  assert [s.ffn for s in source.config.layers] == report['stages'][-1]['ffn']
  assert measured(files, finished, tmp_path) == pytest.approx(report['perplexity']['recovered'], rel=1e-5)


def test_first_stage_is_scored_with_the_weights_held_once(files, tmp_path, monkeypatch):
  """All arrays alive at a pruning step, in bytes of the dense model."""
  held, write = [], MetricsLog.write
  dense = sum(x.nbytes for x in load_file(files / 'model/model.safetensors').values())

  def measure(self, event, **values):
    write(self, event, **values)
    if event == 'prune':
      gc.collect()
      held.append((sum(x.nbytes for x in jax.live_arrays()) - before) / dense)

  monkeypatch.setattr(MetricsLog, 'write', measure)
  gc.collect()
  before = sum(x.nbytes for x in jax.live_arrays())
  config = runs.make_config(files)
  config.prune.steps, config.evaluate.source = 16, ()
  start(config, tmp_path / 'out', 'prune')
  assert len(held) > 3 and min(held) >= 1 and max(held) < 1.1


def test_plan_tells_what_was_kept_in_the_original_numbering(files, pruned):
  """Pruning alone: the saved weights are the source's rows at the plan's indices; none are corrected."""
  path, report = pruned['none'], read_report(pruned['none'])
  assert report['perplexity']['recovered'] is None and report['compiles']['training'] == 0
  before, after = load_file(files / 'model/model.safetensors'), load_file(path / 'hf/model.safetensors')
  for i, layer in enumerate(json.loads((path / 'plan.json').read_text())['layers']):
    name = f'model.layers.{i}.mlp.down_proj.weight'
    np.testing.assert_array_equal(after[name], before[name][:, layer['ffn_channels']])
    name = f'model.layers.{i}.self_attn.q_proj.weight'
    rows = before[name].reshape(3, -1, runs.HIDDEN)[layer['kv_groups']]
    np.testing.assert_array_equal(after[name], rows.reshape(-1, runs.HIDDEN))


@pytest.mark.parametrize('compensate', ['least_squares', 'bias'])
def test_compensated_weights_are_saved_and_better(pruned, compensate):
  """What is not an output projection keeps its bits, and biases are exported."""
  reports = {kind: read_report(pruned[kind]) for kind in ('none', compensate)}
  assert reports[compensate]['perplexity']['pruned'] < reports['none']['perplexity']['pruned']
  plain, ours = (load_file(pruned[kind] / 'hf/model.safetensors') for kind in ('none', compensate))
  changed = {name for name in plain if not np.array_equal(plain[name], ours[name])}
  outputs = {name for name in plain if name.endswith(('o_proj.weight', 'down_proj.weight'))}
  if compensate == 'least_squares':
    assert len(changed) >= len(outputs) // 2 and changed <= outputs  # layers that lose nothing stay
  biases = {name.replace('.weight', '.bias') for name in outputs} if compensate == 'bias' else set()
  assert ours.keys() - plain.keys() == biases
  model, again = reports[compensate]['model'], open_source(str(pruned[compensate] / 'hf'))
  assert count_params(again.config) == model['params_after'] <= model['params_target']


def test_finished_run_started_again_does_nothing(finished, files):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob('*')}
  result = runs.main(files, finished)
  assert result.returncode == 0 and 'finished' in result.stdout
  assert {p: p.stat().st_mtime_ns for p in finished.rglob('*')} == before


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(files, tmp_path):
  config = runs.make_config(files)
  config.train.lr, config.train.min_lr, config.train.clip = 1.0, 1.0, 1e12
  config.train.warmup = 0.0
  config.model.source = str(altered(files / 'model', tmp_path, 'model.norm', 1e19))
  with pytest.raises(InputError, match=r'training step \d+: loss \S+, gradient norm (inf|nan)'):
    start(config, tmp_path / 'out')
  assert [p.name for p in (tmp_path / 'out/checkpoints').iterdir() if p.name.isdigit()]
  assert not (tmp_path / 'out/hf').exists() and not (tmp_path / 'out/report.json').exists()


def test_distillation_and_accumulation_and_remat_run_on_chats_and_text(files, tmp_path, monkeypatch):
  """Of a tokenizer without a template, whose export then has the one that the run was trained with.

  At the end the dense model is loaded again, in the place of the teacher and the optimizer's moments.
  """
  gc.collect()
  before, held, compare = sum(x.nbytes for x in jax.live_arrays()), [], Quality.compare_with_dense

  def noted(self, config, params):
    gc.collect()
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    held.append((sum(x.nbytes for x in jax.live_arrays()) - before) / weights)
    return compare(self, config, params)

  monkeypatch.setattr(Quality, 'compare_with_dense', noted)
  config = runs.make_config(files)
  shutil.copytree(files / 'model', tmp_path / 'base')
  (tmp_path / 'base/chat_template.jinja').unlink()
  config.model.source, config.data.chat_template = str(tmp_path / 'base'), 'plain'
  lines = (files / 'train.txt').read_text().splitlines()[:300]
  rows = [json.dumps({'instruction': 'the union?', 'output': line}) for line in lines]
  (tmp_path / 'chats.jsonl').write_text('\n'.join(rows))
  config.train.source = (str(tmp_path / 'chats.jsonl'), str(files / 'train.txt'))
  config.train.weights = (3.0, 1.0)
  config.train.micro_batch, config.train.remat, config.train.distill.alpha = 2, 'True', 0.5
  config.evaluate.max_tokens = 32  # of which the last model's states are held too
  report = start(config, tmp_path / 'out')
  assert report['perplexity']['recovered'] < report['perplexity']['pruned']
  assert "'Assistant: '" in open_source(str(tmp_path / 'out/hf')).load_tokenizer().chat_template
  assert len(held) == 1 and held[0] < 1.5


def test_healing_holds_one_copy_of_the_weights(files, tmp_path, monkeypatch):
  """And both moments; not the pruned weights that it copied."""
  gc.collect()
  before, held, heal = sum(x.nbytes for x in jax.live_arrays()), [], Healing.heal

  def noted(self, config, arrays, title, after_step):
    weights = sum(x.nbytes for x in jax.tree.leaves(arrays['params']))

    def step(done):
      gc.collect()
      held.append((sum(x.nbytes for x in jax.live_arrays()) - before) / weights)
      after_step(done)

    heal(self, config, arrays, title, step)

  monkeypatch.setattr(Healing, 'heal', noted)
  config = runs.make_config(files)
  config.prune.heal, config.train.tokens, config.evaluate.source = 1, 0, ()
  start(config, tmp_path / 'out', 'prune')
  assert held and held[0] < 3.3


def test_bfloat16_trains_fp32_master_weights(files, tmp_path):
  """With moments in bfloat16 too."""
  config = runs.make_config(files)
  config.model.dtype = config.train.dtype = config.train.moments_dtype = 'bfloat16'
  config.model.source = str(files / 'bfloat16')
  report = start(config, tmp_path / 'out')
  assert report['perplexity']['recovered'] < report['perplexity']['pruned']
  saved = load_file(tmp_path / 'out/hf/model.safetensors')
  assert {str(x.dtype) for x in saved.values()} == {'bfloat16'}  # as in the source


def test_the_learning_rate_follows_from_the_weights(files, tmp_path, monkeypatch):
  """Where none is given; after a kill it is the same, also in an export of the unfinished run."""
  config = runs.make_config(files)
  config.train.lr = config.train.min_lr = -1.0
  config.prune.compensate = 'none'
  path = tmp_path / 'out'
  runs.keep_checkpoints(monkeypatch)
  report = start(config, path)
  options = from_dict(config.to_dict())
  expected = with_rate(options.train, open_source(str(files / 'model')).stored_params())
  assert report['train']['lr'] == expected.lr > 0 and report['train']['min_lr'] == expected.min_lr
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  config.model.source = str(path)
  assert start(config, tmp_path / 'export', 'export')['train']['lr'] == expected.lr


def test_prune_mode_repeats_a_model_of_mixed_dtypes(files, tmp_path):
  """Norms in float32 beside bfloat16 matrices, as llama.cpp stores them: dtypes survive.

  Measures the saved weights, which are rounded. Without its report, a finished run is repeated, log and all.
  """
  config = runs.make_config(files)
  config.model.source = str(altered(files / 'bfloat16', tmp_path, 'norm'))
  report = start(config, tmp_path / 'out', 'prune')
  again = measured(files, tmp_path / 'out', tmp_path)
  assert again == pytest.approx(report['perplexity']['pruned'], rel=1e-6)
  first = (tmp_path / 'out/hf/model.safetensors').read_bytes()
  saved = load_file(tmp_path / 'out/hf/model.safetensors')
  assert {str(v.dtype) for k, v in saved.items() if 'norm' in k} == {'float32'}
  assert {str(v.dtype) for k, v in saved.items() if 'norm' not in k} == {'bfloat16'}
  logged = [row['event'] for row in runs.events(tmp_path / 'out')]
  (tmp_path / 'out/report.json').unlink()
  start(config, tmp_path / 'out', 'prune')
  assert (tmp_path / 'out/hf/model.safetensors').read_bytes() == first
  assert [row['event'] for row in runs.events(tmp_path / 'out')] == logged


def test_other_weights_of_the_same_name_are_refused_on_a_resume(finished, files, tmp_path):
  """A half-trained student would go on with another teacher."""
  path, file = unfinished(finished, tmp_path / 'out'), files / 'model/model.safetensors'
  before = file.read_bytes()
  try:
    save_file({name: 2 * array for name, array in load_file(file).items()}, file)
    assert 'model.source' in refused(start, runs.make_config(files), path)
  finally:
    file.write_bytes(before)


def test_an_edited_plan_is_one_line_that_tells_what_to_delete(finished, files, tmp_path):
  plan_file = unfinished(finished, tmp_path / 'out') / 'plan.json'
  plan = json.loads(plan_file.read_text())
  plan['layers'][0]['ffn_channels'].pop()
  plan_file.write_text(json.dumps(plan))
  message = refused(start, runs.make_config(files), tmp_path / 'out')
  assert str(plan_file) in message and 'delete' in message


def test_training_is_saved_before_it_is_measured(files, tmp_path, monkeypatch):
  """Tasks may take hours, and fail."""
  config, path, measure = runs.make_config(files), tmp_path / 'out', Quality.perplexity
  config.train.save_every = 10**6

  def fail(self, config, params, of, *args, **options):
    if of == 'recovered':
      raise InputError('out of memory')
    return measure(self, config, params, of, *args, **options)

  taken, close, closed = runs.steps_of(monkeypatch), StateStore.close, []
  with monkeypatch.context() as broken, pytest.raises(InputError, match='out of memory'):
    broken.setattr(Quality, 'perplexity', fail)
    broken.setattr(StateStore, 'close', lambda store: closed.append(close(store)))
    start(config, path)
  assert closed  # it waits for a checkpoint that is still being written
  assert len(taken) == 8
  start(config, path)
  assert len(taken) == 8
