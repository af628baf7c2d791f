"""Several texts in evaluate.source: their names, and what is said of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.values import named_texts
from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.reports.summary import texts_table, warnings
from tests.support.helpers import UNIFORM, VARIED, logits, random_params, random_tokens, refused, tiny_config


@pytest.mark.parametrize(
  'source,texts',
  [
    ((), {}),
    (('a.txt', 'b.txt'), {'text': ('a.txt', 'b.txt')}),
    (('web=a.jsonl', 'wiki=b.txt', 'web=c.txt'), {'web': ('a.jsonl', 'c.txt'), 'wiki': ('b.txt',)}),
    (('org/name:split', 'chat-1=x=y.txt'), {'text': ('org/name:split',), 'chat-1': ('x=y.txt',)}),
    (('./a=b.txt', '=c.txt', '1=d.txt'), {'text': ('./a=b.txt', '=c.txt', '1=d.txt')}),
  ],
)
def test_entries_are_parted_by_name(source, texts):
  assert named_texts(source) == texts
  assert from_dict({'evaluate': {'source': source}}).evaluate.texts == texts


def test_divergence_is_the_mean_kl_over_the_counted_tokens():
  """Against float64 arithmetic on all logits; of a model from itself it is zero."""
  dense, model = tiny_config(layers=UNIFORM), tiny_config(layers=VARIED)
  params = {config: random_params(config, seed) for seed, config in enumerate((dense, model))}
  tokens = random_tokens(dense, rows=3, length=20).astype(np.int32)
  targets = np.random.default_rng(1).random(tokens.shape) < 0.7
  evaluator = Evaluator(Blocks(tokens, targets, 0), 2, compiler=Compiler(), dtype=jnp.float32)
  reference = evaluator.reference(dense, params[dense], 'dense')
  log_p, log_q = (
    np.log(
      np.exp(x := np.asarray(logits(c, params[c], tokens), np.float64)) / np.exp(x).sum(-1, keepdims=True)
    )
    for c in (dense, model)
  )
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[:, :-1][targets[:, 1:]].mean()
  assert kl > 0.1
  assert evaluator.divergence(model, params[model], reference, 'kl') == pytest.approx(kl, rel=1e-4)
  assert evaluator.divergence(dense, params[dense], reference, 'kl') == pytest.approx(0, abs=1e-6)


def test_a_model_that_was_kept_does_not_run_again():
  """Neither the reference nor what is compared with it, also where both have one shape."""
  config = tiny_config(layers=UNIFORM)
  dense, model = (random_params(config, seed) for seed in range(2))
  tokens = random_tokens(config, rows=3, length=20).astype(np.int32)
  blocks = Blocks(tokens, np.ones(tokens.shape, bool), 0)
  evaluator = Evaluator(blocks, 2, compiler=Compiler(), dtype=jnp.float32)
  kl = evaluator.divergence(config, model, evaluator.reference(config, dense, 'dense'), 'kl')
  evaluator.perplexity(config, dense, 'dense', keep='reference')
  evaluator.perplexity(config, model, 'model', keep='divergence')
  heads = [{name: x for name, x in of.items() if name in ('embed', 'lm_head')} for of in (dense, model)]
  reference = evaluator.reference(config, heads[0], 'dense')  # it has no layers to run
  assert kl > 0.1 and evaluator.divergence(config, heads[1], reference, 'kl') == kl


def test_a_loss_that_is_no_number_advises_what_an_evaluation_has():
  config = tiny_config(layers=UNIFORM[:1])
  params = random_params(config)
  params['norm'] = params['norm'] * np.float32('nan')
  blocks = Blocks(np.ones((1, 4), np.int32), np.ones((1, 4), bool), 0)
  evaluator = Evaluator(blocks, 1, compiler=Compiler(), dtype=jnp.float32)
  message = refused(evaluator.perplexity, config, params, 'text')
  assert 'model.dtype' in message and 'export' not in message


TEXTS = {
  'wiki': {'dense': 20.0, 'pruned': 40.0, 'recovered': 22.0, 'kl': 0.12345},
  'web': {'dense': 30.0, 'pruned': 90.0, 'recovered': 45.0, 'kl': 0.5},
}


def test_a_row_a_text():
  assert texts_table(TEXTS).rows == [
    ['wiki', '20.00', '40.00', '22.00', '0.095', '0.123'],
    ['web', '30.00', '90.00', '45.00', '0.405', '0.500'],
  ]
  assert texts_table({'wiki': {'dense': 20.0}}).rows[0] == ['wiki', '20.00', '–', '–']


def test_a_text_that_lost_more_than_twice_as_much_is_told():
  (line,) = warnings(TEXTS)
  assert line.startswith('warning: the model lost 0.405 nats per token on web, but 0.095 on wiki')
  assert 'prune.calibration.source' in line and 'docs/texts.md' in line and '\n' not in line
  even = TEXTS | {'web': TEXTS['web'] | {'recovered': 34.0}}
  assert warnings(even) == warnings({'wiki': TEXTS['wiki']}) == warnings({}) == []
  gained = {'wiki': {'dense': 20.0, 'pruned': 18.0}, 'web': {'dense': 30.0, 'pruned': 30.5}}
  assert warnings(gained) == []  # within what is no loss to speak of


def test_training_that_made_a_model_worse_is_told():
  """On any text, and even if all texts lost alike; not for a difference that means nothing."""
  worse = {'a': {'dense': 30.0, 'pruned': 40.0, 'recovered': 60.0}}
  worse['b'] = {'dense': 20.0, 'pruned': 25.0, 'recovered': 39.0}
  (line,) = warnings(worse)
  assert line.startswith('warning: training raised the perplexity on b from 25.00 to 39.00: lower train.lr')
  assert warnings({'a': worse['a'] | {'recovered': 41.0}}) == []


def test_models_of_one_shape_in_two_dtypes_are_measured_one_after_another():
  config = tiny_config()
  params = random_params(config)
  tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
  evaluator = Evaluator(Blocks(tokens, tokens > 0, 0), 2, compiler=Compiler(), dtype=jnp.float32)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  wide, narrow = (evaluator.perplexity(config, of, 'text') for of in (params, rounded))
  assert wide == pytest.approx(narrow, rel=0.05)
