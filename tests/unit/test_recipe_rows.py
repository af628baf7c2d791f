"""The rows of configs/published.py: rows of the data sets, tokenised with a recipe's own options."""

import dataclasses
import itertools
import json
import types
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from adapt_jax.config.build import from_dict
from adapt_jax.configs import published
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.train_set import open_train_set
from adapt_jax.pipeline.loader import Loader
from tests.support.helpers import tiny_config
from tests.support.tokenizers_for_tests import CHATML_DEFAULT_SYSTEM, tiny_tokenizer

SYSTEM, ASKED = '<|im_start|>system\n{}<|im_end|>\n', '<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n'
DEFAULT, ANSWER = SYSTEM.format('You are a helpful assistant.'), 'A.<|im_end|>\n'
Q, A = {'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A.'}
# Rows of three sets, and their texts: the second, fourth ... parts are what the loss counts.
ROWS = {
  'OpenOrca': (
    {'system_prompt': 'S', 'question': 'Q', 'response': 'A.'},
    (SYSTEM.format('S') + ASKED, ANSWER + '</s>'),
  ),
  'ultrachat_200k': (
    {'prompt': 'Q', 'messages': [Q, A, Q, A]},
    (DEFAULT + ASKED, ANSWER, ASKED, ANSWER + '</s>'),
  ),
  'OpenO1-SFT': ({'instruction': 'Q', 'output': 'A.'}, (DEFAULT + ASKED, ANSWER + '</s>')),
}


def options_of(name, **groups):
  """The recipe's options, with other values of some fields: train={'source': …}."""
  options = from_dict(published.get_config(name).to_dict())
  return dataclasses.replace(
    options, **{group: dataclasses.replace(getattr(options, group), **of) for group, of in groups.items()}
  )


def mobilellm_like():
  """No chat template; BOS goes before plain text."""
  return tiny_tokenizer(None), '<s>'


def qwen_like():
  """Has a chat template of its own; no BOS."""
  tokenizer = tiny_tokenizer(CHATML_DEFAULT_SYSTEM)
  tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
  assert tokenizer('x')['input_ids'] == tokenizer('x', add_special_tokens=False)['input_ids']
  return tokenizer, ''


@pytest.mark.parametrize(
  ('name', 'make'),
  [
    ('mobilellm_350m_to_125m', mobilellm_like),
    ('qwen_0.5b_to_350m', qwen_like),
  ],
)
def test_training_rows_are_the_papers(tmp_path, name, make):
  tokenizer, before = make()
  expected = []
  for number, (row, parts) in enumerate(ROWS.values()):
    (tmp_path / f'{number:02}.jsonl').write_text(json.dumps(row) + '\n')  # columns differ from set to set
    texts = [before + parts[0], *parts[1:]]
    ids = [tokenizer(text, add_special_tokens=False)['input_ids'] for text in texts]
    mask = [index % 2 == 1 for index, part in enumerate(ids) for _ in part]
    expected.append((list(itertools.chain(*ids)), mask))
  options = options_of(name, train={'source': (str(tmp_path),)}, data={'cache': str(tmp_path / 'cache')})
  found = open_train_set(
    options.train, options.data, with_template(tokenizer, options.data.chat_template), 320, options.seed
  )
  tokens, targets, segments = found.read(np.arange(len(found)))
  assert tokens.shape == (len(ROWS), 1024)
  for index, (ids, mask) in enumerate(expected):
    size = len(ids)
    assert tokens[index, :size].tolist() == ids and targets[index, :size].tolist() == mask
    assert not targets[index, size:].any() and not segments[index, size:].any()
    assert (segments[index, :size] == 1).all()


def test_a_long_answer_is_cut_without_an_end(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps({'instruction': 'Q', 'output': 'A.' * 2000}) + '\n')
  options = options_of(
    'mobilellm_350m_to_125m',
    train={'source': (str(tmp_path),)},
    data={'cache': str(tmp_path / 'cache')},
  )
  tokenizer = with_template(tiny_tokenizer(None), options.data.chat_template)
  found = open_train_set(options.train, options.data, tokenizer, 320, options.seed)
  tokens, targets, _ = found.read(np.arange(1))
  assert tokens.shape == (1, 1024) and targets[0, -1] and tokenizer.eos_token_id not in tokens


def calibration(options, tokenizer):
  source: Any = types.SimpleNamespace(config=tiny_config(vocab_size=320))
  return Loader(options, source, tokenizer).calibration()


def test_calibration_rows_lie_within_single_documents(tmp_path):
  tokenizer = mobilellm_like()[0]
  texts = [' '.join(f'{number} and {i}.' for i in range(30 + number % 50)) for number in range(520)]
  texts[7] = 'Too short.'
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  options = options_of('llama_8b_20_percent')
  assert options.prune.calibration.source == ('DKYoon/SlimPajama-6B',)
  changed = dataclasses.replace(options.prune.calibration, source=(str(tmp_path / 'a.jsonl'),))
  options = dataclasses.replace(options, prune=dataclasses.replace(options.prune, calibration=changed))
  found = calibration(options, tokenizer)
  assert found.tokens.shape == (519, 64) and found.documents == 520
  assert found.targets[:, 1:].all() and not found.targets[:, 0].any()
  places = set()
  for row, text in zip(found.tokens, texts[:7] + texts[8:], strict=True):
    ids = [*tokenizer(text)['input_ids'], tokenizer.eos_token_id]
    spans = [i for i in range(len(ids) - 63) if ids[i : i + 64] == row.tolist()]
    assert spans
    places.add(spans[0])
  assert len(places) > 100 and min(places) < 10 and max(places) > 300  # anywhere in the document
  rows = found.draw(options.prune.calibration.samples, options.seed, 0)
  assert len(set(rows.tolist())) == 512
  assert calibration(options, tokenizer).digest() == found.digest()
  assert calibration(dataclasses.replace(options, seed=1), tokenizer).digest() != found.digest()
