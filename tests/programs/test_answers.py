"""What is asked of models that have no chat template, or no room for questions."""

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.health import Health
from adapt_jax.machine.compiler import Compiler
from adapt_jax.reports.summary import health_lines
from tests.support.helpers import UNIFORM, random_params, random_tokens, tiny_config
from tests.support.tokenizers_for_tests import CHATML, tiny_tokenizer


@pytest.mark.parametrize('template', [None, CHATML])
def test_without_questions_the_models_own_rows_are_continued(template):
  tokenizer = tiny_tokenizer(template)
  config = tiny_config(layers=UNIFORM, vocab_size=len(tokenizer), max_position=16)
  params, rows = random_params(config), random_tokens(config, rows=4, length=16)
  own = Blocks(rows.astype(np.int32), np.ones(rows.shape, bool), 0)
  health = Health(config, tokenizer, {}, lambda: own, compiler=Compiler(), dtype=jnp.float32)
  answers = health.answers(config, params, 'answers')
  assert len(answers) == 4 and max(map(len, answers)) <= 8
  report = health.report(answers, [[7] * 30] * 4)
  assert report['result'] == {'repetition': 1.0} and 'usable' not in report['dense']
  assert [example['prompt'] for example in report['examples']] == tokenizer.batch_decode(
    rows[:, :8], skip_special_tokens=True
  )
  assert health_lines(report)[0].endswith('→ 100 %')
