"""Converts a Hugging Face tokenizer to the metadata from which llama.cpp builds its own.

llama.cpp knows pre-tokenizers only by name, so the name is inferred from how the tokenizer splits text. A
tokenizer that it has no name for is refused: it would load, but give different tokens.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gguf import GGUFWriter

from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.gguf_tokenizer import (
  BYTE,
  CONTROL,
  NORMAL,
  PATTERNS,
  SPACE,
  UNKNOWN,
  UNUSED,
  USER_DEFINED,
)
from adapt_jax.models.formats.trimmed_tokenizer import BYTES, merges_of

# Gemma's tokenizer splits at spaces, of which its normalizer leaves none.
_GEMMA_SPLIT = {
  'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious', 'invert': False
}  # fmt: skip
_SPECIAL = ('bos', 'eos', 'unk', 'pad')


def check_gguf_tokenizer(tokenizer: Any) -> None:
  """Raises InputError for a tokenizer that has no equivalent in llama.cpp."""
  if reason := next((reason for refused, reason in _differences(tokenizer) if refused), ''):
    raise _refusal(reason)


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
  """Adds the metadata of a checked tokenizer; unused tokens fill the vocabulary up to `vocab_size` rows.

  Added tokens beyond those rows are left out, as in llama.cpp's converter: no text of this model has them.
  Raises InputError for other ids beyond the rows of the embedding.
  """
  data, special, tokens = _content(tokenizer), _special(tokenizer), tokenizer.get_vocab()
  types = {t['content']: CONTROL if t['special'] else USER_DEFINED for t in data['added_tokens']}
  types |= dict.fromkeys(tokenizer.all_special_tokens, CONTROL)
  by_id = {i: t for t, i in tokens.items() if i < vocab_size or t not in types}
  highest = max(*by_id, *special.values())
  if highest >= vocab_size:
    raise _refusal(f'it has ids up to {highest}, but the embedding has {vocab_size} rows')
  if sentence_piece := bool(data['model'].get('byte_fallback')):
    types |= dict.fromkeys(BYTES, BYTE)
    if 'unk' in special:
      types[tokenizer.unk_token] = UNKNOWN
  names = [by_id.get(i, f'[PAD{i}]') for i in range(vocab_size)]
  writer.add_tokenizer_model('llama' if sentence_piece else 'gpt2')
  writer.add_tokenizer_pre('default' if sentence_piece else _pre_tokenizer(data))
  writer.add_token_list(names)
  writer.add_token_types([types.get(by_id[i], NORMAL) if i in by_id else UNUSED for i in range(vocab_size)])
  if sentence_piece:
    scores = _scores(merges_of(data['model']))
    writer.add_token_scores([scores.get(name, -float(vocab_size)) for name in names])
    writer.add_add_space_prefix(bool(_space_prefix(data)))
  else:
    writer.add_token_merges([' '.join(merge) for merge in merges_of(data['model'])])
  for name, i in special.items():
    getattr(writer, f'add_{name}_token_id')(i)
  add_bos, add_eos = _added(tokenizer) or (False, False)
  writer.add_add_bos_token(add_bos)
  writer.add_add_eos_token(add_eos)
  template = getattr(tokenizer, 'chat_template', None)
  if template := template.get('default') if isinstance(template, dict) else template:
    writer.add_chat_template(template)


def _refusal(reason: str) -> InputError:
  return InputError(
    f'export.formats: llama.cpp cannot run this tokenizer ({reason}): '
    f'export the model as hf or hf_padded instead of gguf'
  )


def _differences(tokenizer: Any) -> Iterator[tuple[bool, str]]:
  """Yields (whether llama.cpp would give other tokens, why); a rule assumes that those before do not hold."""
  yield getattr(tokenizer, 'backend_tokenizer', None) is None, 'it is not from the tokenizers library'
  data = _content(tokenizer)
  model = data['model']
  yield model['type'] != 'BPE', f'its model is {model["type"]}, not BPE'
  for option in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
    yield bool(model.get(option)), f'{option} = {model.get(option)!r}'
  yield 'eos' not in _special(tokenizer), 'it has no EOS token, and llama.cpp would use another'
  yield _added(tokenizer) is None, 'it encodes a text with more than BOS and EOS around it'
  if not model.get('byte_fallback'):
    steps = {'ignore_merges': bool(model.get('ignore_merges'))}
    steps |= {part: data[part] for part in ('normalizer', 'pre_tokenizer')}
    yield not _pre_tokenizer(data), f'unknown steps {json.dumps(steps)[:400]}'
    return
  yield _space_prefix(data) is None, "its normalizer or pre-tokenizer is not SentencePiece's"
  tokens, merges = tokenizer.get_vocab(), merges_of(model)
  yield bool(BYTES - tokens.keys()), 'byte_fallback without a token for each byte'
  yield bool(apart := _apart(merges)), f'merges that form {apart!r} are not adjacent'
  special = {t['content'] for t in data['added_tokens']} | {*tokenizer.all_special_tokens} | BYTES
  pair = _unmerged(merges, tokens.keys() - special)
  yield bool(pair), f'no merge of {" and ".join(map(repr, pair))}, which together are a token'


def _content(tokenizer: Any) -> dict[str, Any]:
  """The content of tokenizer.json."""
  data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
  return data


def _special(tokenizer: Any) -> dict[str, int]:
  """The ids of special tokens, by name."""
  ids = {name: getattr(tokenizer, f'{name}_token_id', None) for name in _SPECIAL}
  return {name: i for name, i in ids.items() if i is not None}


def _added(tokenizer: Any) -> tuple[bool, bool] | None:
  """Whether encoding adds BOS before and EOS after a text; None if it adds anything else."""
  special = _special(tokenizer)
  plain, full = (tokenizer('a', add_special_tokens=add).input_ids for add in (False, True))
  for bos, eos in itertools.product((False, True), repeat=2):
    if full == [special.get('bos')] * bos + plain + [special['eos']] * eos:
      return bos, eos
  return None


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
  """A normalizer or pre-tokenizer as a flat list of its steps."""
  if part is None:
    return []
  if part['type'] != 'Sequence':
    return [part]
  return [step for inner in part[key] for step in _steps(inner, key)]


def _pre_tokenizer(data: dict[str, Any]) -> str:
  """llama.cpp's name for the pre-tokenizer and normalizer of a byte-level tokenizer; '' if it has none."""
  *cuts, last = _steps(data['pre_tokenizer'], 'pretokenizers') or [{'type': 'missing'}]
  if last['type'] != 'ByteLevel' or last['add_prefix_space']:
    return ''
  name = ''
  if last.get('use_regex', True):  # GPT-2's expression
    digits = [{'type': 'Digits', 'individual_digits': True}]
    name = 'gpt-2' if not cuts else 'smollm' if cuts == digits else ''
  elif len(cuts) == 1 and cuts[0]['type'] == 'Split':
    # The expressions match every character, so that removing what they do not match is the same.
    alike = (cuts[0]['behavior'], cuts[0]['invert']) in (('Isolated', False), ('Removed', True))
    pattern = cuts[0]['pattern'].get('Regex')
    name = next((name for name, known in PATTERNS.items() if known == pattern and alike), '')
  normalizer = [step['type'] for step in _steps(data['normalizer'], 'normalizers')]
  # llama.cpp does not normalise; text that is not in Qwen's NFC form is rare.
  if normalizer and (normalizer, name) != (['NFC'], 'qwen2'):
    return ''
  if data['model'].get('ignore_merges'):
    return name if name == 'llama-bpe' else ''
  return 'dbrx' if name == 'llama-bpe' else name


def _space_prefix(data: dict[str, Any]) -> bool | None:
  """Whether a SentencePiece tokenizer adds a space before a text; None if its steps are others."""
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  prepend = {'type': 'Prepend', 'prepend': SPACE}
  normalizer = _steps(data['normalizer'], 'normalizers')
  cuts = _steps(data['pre_tokenizer'], 'pretokenizers')
  if normalizer == [replace] and cuts == [_GEMMA_SPLIT]:
    return False
  if not cuts and normalizer in ([replace], [prepend, replace]):
    return prepend in normalizer
  # Newer conversions write this. Unlike llama.cpp, it adds no space if the text begins with one.
  whole = {'type': 'Metaspace', 'replacement': SPACE, 'split': False}
  if normalizer in ([], [replace]) and len(cuts) == 1 and cuts[0].items() >= whole.items():
    return bool(cuts[0].get('prepend_scheme', 'always') != 'never')
  return None


# llama.cpp merges any two neighbours that form a token, best score first. Merges converted from a
# SentencePiece model are equivalent: they have all pairs of a token, one after the other.


def _scores(merges: list[tuple[str, str]]) -> dict[str, float]:
  """A score for each token that merges produce, such that llama.cpp merges in the same order."""
  return {token: -float(i) for i, token in enumerate(dict.fromkeys(map(''.join, merges)))}


def _apart(merges: list[tuple[str, str]]) -> str:
  """A token whose merges are not one after the other; '' if there is none."""
  runs = Counter(token for token, _ in itertools.groupby(map(''.join, merges)))
  return next((token for token, count in runs.items() if count > 1), '')


def _unmerged(merges: list[tuple[str, str]], normal: set[str]) -> tuple[str, ...]:
  """Two tokens that together are a token, and have no merge; () if there are none."""
  pairs = set(merges)
  for token in normal:
    for cut in range(1, len(token)):
      pair = (token[:cut], token[cut:])
      if pair[0] in normal and pair[1] in normal and pair not in pairs:
        return pair
  return ()
