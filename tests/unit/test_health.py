"""Which answers count as usable, and which as repeating themselves."""

import pytest

from adapt_jax.evaluation.health import questions, repeats, usable

NUMBERS = list(range(100))


@pytest.mark.parametrize(
  'tokens, found',
  [
    ([], False),
    (NUMBERS[:96], False),
    ([7] * 23, False),  # too short to tell
    ([7] * 24, True),
    (NUMBERS[:9] + [7] * 24, True),
    ([7] * 24 + [8], False),  # it found its way out
    ([5, 6, 7, 8, 9] * 5, True),
    ([9, *[5, 6, 7, 8, 9] * 5, 5, 6], True),  # in the midst of a copy
    (NUMBERS[:32] * 3, True),
    (NUMBERS[:32] * 2, False),
    (NUMBERS[:33] * 3, False),
  ],
)
def test_an_end_of_three_copies_repeats_itself(tokens, found):
  assert repeats(tokens) == found


@pytest.mark.parametrize(
  'tokens, text, expected',
  [
    ([1, 2], 'It is PARIS.', True),
    ([], '', False),
    ([1, 2], 'It is Lyon.', False),
    ([1, 2], 'parisian', False),  # another word
    ([7] * 24, 'Paris ' * 24, False),
    (NUMBERS[:96], 'Paris, which is', True),  # cut at the limit
  ],
)
def test_a_usable_answer_has_an_accepted_word_and_an_end(tokens, text, expected):
  question = questions()[0]
  assert question.text == 'What is the capital of France?' and usable(tokens, text, question) == expected
