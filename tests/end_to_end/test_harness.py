"""Our models in lm-evaluation-harness: the answers of its own `hf` model on the exported weights."""

import contextlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import MeshOptions
from adapt_jax.evaluation import harness
from adapt_jax.export.hf import write_hf
from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler, Programs
from adapt_jax.machine.mesh import load_source
from adapt_jax.models.formats.source import open_source
from adapt_jax.pipeline import quality
from tests.support import harness_tasks, runs
from tests.support.helpers import VARIED, random_params, refused, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytest.importorskip('lm_eval')
harness_lm = pytest.importorskip('adapt_jax.evaluation.harness_lm')
pytestmark = pytest.mark.usefixtures('code_cache')
LONGEST = 64  # tokens that the tiny model sees at once: some questions and texts are longer


@pytest.fixture(scope='module')
def tasks_path(tmp_path_factory):
  path = harness_tasks.write_tasks(tmp_path_factory.mktemp('tasks'))
  text = (path / 'choice.yaml').read_text()
  (path / 'gone.yaml').write_text(text.replace('choice.jsonl', 'gone.jsonl').replace('toy_choice', 'gone'))
  return path


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A model with widths of its own in every layer."""
  tokenizer = tiny_tokenizer()
  config = tiny_config(layers=VARIED[:2], vocab_size=len(tokenizer), max_position=LONGEST)
  directory = tmp_path_factory.mktemp('model') / 'hf'
  write_hf(config, random_params(config), directory, tokenizer=tokenizer)
  return open_source(str(directory))


def options_of(tasks_path, *tasks, **fields):
  config = runs.base.get_config().evaluate
  config.update({'tasks': tasks, 'tasks_path': str(tasks_path), 'length': 64, 'batch': 4, **fields})
  return from_dict(runs.base.get_config().to_dict() | {'evaluate': config.to_dict()}).evaluate


def make_lm(source, compiler=None, tokens=256):
  return harness_lm.FlaxLM(
    source.config,
    load_source(source, jnp.float32),
    source.load_tokenizer(),
    source.generation,
    tokens=tokens,
    compiler=compiler or Compiler(),
    dtype=jnp.float32,
    title='tasks',
  )


@pytest.fixture(scope='module')
def hf_lm(source):
  from lm_eval.models.huggingface import HFLM

  return HFLM(str(source.path), device='cpu', dtype='float32', batch_size=3, trust_remote_code=True)


def responses(results, task):
  return [x for sample in results['samples'][task] for repeats in sample['resps'] for x in repeats]


def test_answers_are_those_of_the_harness_own_model(source, tasks_path, hf_lm):
  """Every request of every kind, few compiles, and the scores that follow from the answers."""
  texts = [len(source.load_tokenizer()(text).input_ids) for text in harness_tasks.TEXTS]
  assert min(texts) < LONGEST < max(texts) / 2  # in windows
  tasks, compiler = ('toy_choice', 'toy_answer', 'toy_text'), Compiler()
  options = options_of(tasks_path, *tasks)
  ours, theirs = (
    harness.evaluate_lm(options, lm, log_samples=True) for lm in (make_lm(source, compiler), hf_lm)
  )
  assert compiler.counts['harness'] <= 6
  for task in tasks:
    a, b = ([np.atleast_1d(np.array(x, float)) for x in responses(of, task)] for of in (ours, theirs))
    assert len(a) >= 3 and len({round(x[0], 2) for x in a}) > 2
    np.testing.assert_allclose(a, b, atol=1e-3)
    figures = {k: v for k, v in theirs['results'][task].items() if not isinstance(v, str)}
    assert len(figures) >= 2
    assert {k: ours['results'][task][k] for k in figures} == pytest.approx(figures, rel=1e-4)


def written(lm, options):
  return responses(harness.evaluate_lm(options, lm, log_samples=True), 'toy_write')


def test_texts_are_those_of_the_harness_own_model(source, tasks_path, hf_lm, monkeypatch):
  """Some end at a stop string, some run on, over more than one piece; long contexts lose their beginning."""
  options = options_of(tasks_path, 'toy_write')
  plain = written(make_lm(source), options)
  assert plain == written(hf_lm, options)
  tokenizer = source.load_tokenizer()
  lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in plain]
  assert min(lengths) < 20 < 32 < max(lengths)
  # Several end tokens, and a penalty; one text at a time, since pads of a batch are penalised too.
  words = {token: tokenizer.decode([token]) for token in range(5, len(tokenizer))}
  often = max(words, key=lambda token: ''.join(plain).count(words[token]) if len(words[token]) > 1 else 0)
  tokenizer.add_special_tokens({'additional_special_tokens': [words[often]]})  # end tokens are special
  tokenizer.pad_token = tokenizer.eos_token
  monkeypatch.setattr(hf_lm, 'tokenizer', tokenizer)
  monkeypatch.setattr(hf_lm, 'batch_size_per_gpu', 1)
  for fields in ({'repetition_penalty': 1.5}, {'eos_token_id': [tokenizer.eos_token_id, often]}):
    ours = make_lm(source)
    ours.tokenizer, ours._generation = tokenizer, source.generation | fields
    with monkeypatch.context() as patch:
      for name, value in fields.items():
        patch.setattr(hf_lm.model.generation_config, name, value)
      theirs = written(hf_lm, options)
    assert written(ours, options) == theirs != plain


@pytest.mark.parametrize('context, answer', [([5, 6], []), ([], [7]), ([5], [6] * (LONGEST + 1))])
def test_requests_that_no_model_can_answer_are_refused(source, context, answer):
  requests = [(('a', 'b'), context, answer)]
  assert 'evaluate.tasks' in refused(make_lm(source)._loglikelihood_tokens, requests)


def test_scores_by_task_and_group(source, tasks_path):
  options = options_of(tasks_path, 'toy', 'toy_text', limit=3)
  params, tokenizer = load_source(source, jnp.float32), source.load_tokenizer()
  common = {'compiler': Compiler(Programs()), 'dtype': jnp.float32, 'title': 'tasks'}
  scores = harness.evaluate_tasks(options, source.config, params, tokenizer, {}, **common)
  assert set(scores) == {'toy', 'toy_text'}
  assert scores['toy']['n'] == 6 and scores['toy_text']['n'] == 3 and scores['toy_text']['version'] == 1.0
  assert 0 <= scores['toy']['acc'] <= 1 and scores['toy']['acc_stderr'] > 0
  assert scores['toy_text']['word_perplexity'] > 1
  again = harness.evaluate_tasks(options, source.config, params, tokenizer, {}, **common)
  assert again == json.loads(json.dumps(scores))  # with the tasks that are open


def asked(*pairs):
  return [types.SimpleNamespace(args=pair) for pair in pairs]


def test_order_batches_and_devices_do_not_matter(source):
  questions = [(q, ' ' + choice) for q, choices, _ in harness_tasks.QUESTIONS[:4] for choice in choices]
  want = make_lm(source).loglikelihood(asked(*questions))
  assert len({score for score, _ in want}) > len(want) // 2
  devices = mesh.make_mesh(MeshOptions(data=2, fsdp=2, tensor=1))
  for tokens, context in ((64, contextlib.nullcontext()), (256, jax.set_mesh(devices))):
    with context:
      got = make_lm(source, tokens=tokens).loglikelihood(asked(*questions[::-1]))[::-1]
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in want], atol=1e-4)


def test_a_question_asked_again_has_another_answer(source, tasks_path):
  """Where the task samples, and whatever fits into a batch: two rows here."""
  lm = make_lm(source, tokens=128)
  settings = {'until': [], 'max_gen_toks': 24, 'do_sample': True, 'temperature': 1.0}
  texts = dict(lm._write([[5, 6, 7]] * 6, settings))
  assert len(set(texts.values())) == 6


def test_tasks_that_run_code_are_refused(tasks_path, monkeypatch):
  from lm_eval.api.task import ConfigurableTask

  monkeypatch.setattr(ConfigurableTask, 'UNSAFE_CODE', True, raising=False)
  harness._open.cache_clear()
  assert 'toy_choice runs code' in refused(harness.check_tasks, options_of(tasks_path, 'toy_choice'))
  harness._open.cache_clear()


# -- configs ---------------------------------------------------------------------------------------


def test_tasks_that_cannot_be_opened_are_one_line(tasks_path, tmp_path):
  assert 'arc_easy' in refused(harness.check_tasks, options_of(tasks_path, 'arc_eazy'))
  assert 'toy_choice' in refused(harness.check_tasks, options_of(tasks_path, 'toy_choise'))
  assert 'tasks_path' in refused(harness.check_tasks, options_of(tmp_path / 'nowhere', 'gone'))
  twice = refused(harness.check_tasks, options_of(tasks_path, 'toy', 'toy_choice'))
  assert 'toy_choice' in twice and 'once' in twice
  assert "'gone'" in refused(harness.check_tasks, options_of(tasks_path, 'gone'))


def test_the_suite_of_the_paper_is_known_to_the_harness(tasks_path):
  wanted = harness.wanted(options_of(tasks_path, 'piqa', suite='paper'))
  assert wanted == harness.PAPER | {'piqa': None}
  assert set(wanted) <= set(harness._manager(str(tasks_path)).all_tasks)


def test_without_the_package_the_extra_is_named(tasks_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
  monkeypatch.setattr(harness, '_manager', harness._manager.__wrapped__)  # not the one that is open
  assert "'adapt-jax[eval]'" in refused(harness.check_tasks, options_of(tasks_path, 'piqa'))


# -- modes -----------------------------------------------------------------------------------------


def make_config(files, tasks_path, **fields):
  config = runs.make_config(files)
  config.evaluate.update({'tasks_path': str(tasks_path), **fields})
  config.prune.stages = 1
  config.train.tokens = 6 * 4 * 32
  return config


def test_mode_evaluate_needs_no_text(files, tasks_path, tmp_path, capsys):
  config = make_config(files, tasks_path, tasks=('toy_choice', 'toy_text'), source=(), limit=2)
  report = runs.in_process(config, tmp_path / 'out', 'evaluate')
  assert 'perplexity' not in report and set(report['tasks']) == {'toy_choice', 'toy_text'}
  assert report['versions']['lm_eval'] and report['compiles']['harness'] <= 6
  assert '| toy_choice | acc_norm, % | 2 |' in capsys.readouterr().out


def test_a_run_scores_dense_pruned_and_recovered_once(files, tasks_path, tmp_path, monkeypatch):
  """Killed while it scores the pruned model: the dense model's scores are kept."""
  asked, real, kills = [], harness.evaluate_tasks, [KeyboardInterrupt]

  def evaluate_tasks(*args, title, **kwargs):
    asked.append(title)
    if title == 'pruned: tasks' and kills:
      raise kills.pop()
    return real(*args, title=title, **kwargs)

  monkeypatch.setattr(quality, 'evaluate_tasks', evaluate_tasks)
  config = make_config(files, tasks_path, tasks=('toy_text',), limit=1)
  with pytest.raises(KeyboardInterrupt):
    runs.in_process(config, tmp_path / 'out')
  report = runs.in_process(config, tmp_path / 'out')
  assert asked == ['dense: tasks', 'pruned: tasks', 'pruned: tasks', 'recovered: tasks']
  assert list(report['tasks']) == ['dense', 'pruned', 'recovered']
  texts = {name: scores['toy_text']['word_perplexity'] for name, scores in report['tasks'].items()}
  assert len(set(texts.values())) == 3 and report['compiles']['harness'] > 0
