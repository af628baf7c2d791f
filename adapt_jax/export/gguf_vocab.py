"""Converts a Hugging Face tokenizer to the metadata from which llama.cpp builds its own.

llama.cpp knows pre-tokenizers only by name, so the name is inferred from how the tokenizer splits text. A
tokenizer that it has no name for is refused: it would load, but give different tokens.
"""

import json
from typing import Any, NamedTuple

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

# Gemma's tokenizer splits at spaces, of which its normalizer leaves none.
_GEMMA_SPLIT = {
  'type': 'Split',
  'pattern': {'String': ' '},
  'behavior': 'MergedWithPrevious',
  'invert': False,
}
_SPECIAL = ('bos', 'eos', 'unk', 'pad')


class _Vocabulary(NamedTuple):
  """What llama.cpp needs to know about a tokenizer: gpt2 uses `merges`, llama uses `scores`."""

  model: str  # gpt2: byte-level BPE; llama: SentencePiece BPE
  pre: str
  tokens: dict[str, int]
  types: dict[str, int]  # of tokens that are not NORMAL
  merges: list[str]
  scores: dict[str, float]  # of tokens that merges produce
  space_prefix: bool
  special: dict[str, int]
  add_bos: bool
  add_eos: bool
  chat_template: str | None


def check_gguf_tokenizer(tokenizer: Any) -> None:
  """Raises InputError for a tokenizer that has no equivalent in llama.cpp."""
  _describe(tokenizer)


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
  """Adds the tokenizer's metadata; unused tokens fill the vocabulary up to the embedding's `vocab_size` rows.

  Added tokens beyond those rows are left out, as in llama.cpp's converter: no text of this model has them.

  Raises InputError as `check_gguf_tokenizer`, and for other ids beyond the rows.
  """
  described = _describe(tokenizer)
  added = {token for token, kind in described.types.items() if kind in (CONTROL, USER_DEFINED)}
  by_id = {i: t for t, i in described.tokens.items() if i < vocab_size or t not in added}
  if max(by_id) >= vocab_size or max(described.special.values()) >= vocab_size:
    highest = max(*by_id, *described.special.values())
    raise _refusal(f'it has ids up to {highest}, but the embedding has {vocab_size} rows')
  tokens = [by_id.get(i, f'[PAD{i}]') for i in range(vocab_size)]
  types = [described.types.get(by_id[i], NORMAL) if i in by_id else UNUSED for i in range(vocab_size)]
  writer.add_tokenizer_model(described.model)
  writer.add_tokenizer_pre(described.pre)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  if described.model == 'gpt2':
    writer.add_token_merges(described.merges)
  else:
    lowest = -float(len(tokens))
    writer.add_token_scores([described.scores.get(token, lowest) for token in tokens])
    writer.add_add_space_prefix(described.space_prefix)
  for name, i in described.special.items():
    getattr(writer, f'add_{name}_token_id')(i)
  writer.add_add_bos_token(described.add_bos)
  writer.add_add_eos_token(described.add_eos)
  if described.chat_template:
    writer.add_chat_template(described.chat_template)


def _refusal(reason: str) -> InputError:
  return InputError(
    f'export.formats: llama.cpp cannot run this tokenizer ({reason}): '
    f'export the model as hf or hf_padded instead of gguf'
  )


def _describe(tokenizer: Any) -> _Vocabulary:
  data = _bpe(tokenizer)
  special = {name: i for name in _SPECIAL if (i := getattr(tokenizer, f'{name}_token_id', None)) is not None}
  if 'eos' not in special:
    raise _refusal('it has no EOS token, and llama.cpp would use another')
  add_bos, add_eos = _added(tokenizer, special)
  tokens = tokenizer.get_vocab()
  types = {t['content']: CONTROL if t['special'] else USER_DEFINED for t in data['added_tokens']}
  types |= dict.fromkeys(tokenizer.all_special_tokens, CONTROL)
  merges = [
    tuple(merge.split(' ', 1) if isinstance(merge, str) else merge) for merge in data['model']['merges']
  ]
  scores: dict[str, float] = {}
  prefix = False
  if data['model'].get('byte_fallback'):
    model, pre = 'llama', 'default'
    prefix = _space_prefix(data)
    types |= _byte_types(tokens)
    if 'unk' in special:
      types[tokenizer.unk_token] = UNKNOWN
    scores = _scores(merges, tokens.keys() - types.keys())
  else:
    model, pre = 'gpt2', _pre_tokenizer(data)
  template = getattr(tokenizer, 'chat_template', None)
  if isinstance(template, dict):
    template = template.get('default')
  joined = [' '.join(merge) for merge in merges]
  return _Vocabulary(model, pre, tokens, types, joined, scores, prefix, special, add_bos, add_eos, template)


def _bpe(tokenizer: Any) -> dict[str, Any]:
  """The content of tokenizer.json for a BPE tokenizer."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  if backend is None:
    raise _refusal('it is not from the tokenizers library')
  data: dict[str, Any] = json.loads(backend.to_str())
  if data['model']['type'] != 'BPE':
    raise _refusal(f'its model is {data["model"]["type"]}, not BPE')
  for option in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
    if value := data['model'].get(option):
      raise _refusal(f'{option} = {value!r}')
  return data


def _added(tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
  """Whether encoding adds BOS before and EOS after a text."""
  plain, full = (tokenizer('a', add_special_tokens=add).input_ids for add in (False, True))
  for bos in (False, True):
    for eos in (False, True):
      before = [special.get('bos')] if bos else []
      if full == [*before, *plain, *([special['eos']] if eos else [])]:
        return bos, eos
  raise _refusal(f'it encodes "a" as {full}, with more than BOS and EOS around {plain}')


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
  """A normalizer or pre-tokenizer as a flat list of its steps."""
  if part is None:
    return []
  if part['type'] != 'Sequence':
    return [part]
  return [step for inner in part[key] for step in _steps(inner, key)]


def _pre_tokenizer(data: dict[str, Any]) -> str:
  """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer."""
  *cuts, last = _steps(data['pre_tokenizer'], 'pretokenizers') or [{'type': 'missing'}]
  if last['type'] != 'ByteLevel' or last['add_prefix_space']:
    raise _refusal('neither byte-level nor SentencePiece BPE')
  found = None
  if last.get('use_regex', True):  # GPT-2's expression
    if not cuts:
      found = 'gpt-2'
    elif cuts == [{'type': 'Digits', 'individual_digits': True}]:
      found = 'smollm'
  elif len(cuts) == 1 and cuts[0]['type'] == 'Split':
    # The expressions match every character, so that removing what they do not match is the same.
    alike = (cuts[0]['behavior'], cuts[0]['invert']) in (('Isolated', False), ('Removed', True))
    pattern = cuts[0]['pattern'].get('Regex')
    found = next((name for name, known in PATTERNS.items() if known == pattern and alike), None)
  if found is None:
    raise _refusal(f'its pre-tokenizer is {json.dumps(cuts)[:200]}')
  normalizer = [step['type'] for step in _steps(data['normalizer'], 'normalizers')]
  # llama.cpp does not normalise; text that is not in Qwen's NFC form is rare.
  if normalizer and (normalizer, found) != (['NFC'], 'qwen2'):
    raise _refusal(f'its normalizer is {", ".join(normalizer)}')
  if not data['model'].get('ignore_merges'):
    return 'dbrx' if found == 'llama-bpe' else found
  if found != 'llama-bpe':
    raise _refusal(f'ignore_merges = True beside pre-tokenizer {found}')
  return found


def _space_prefix(data: dict[str, Any]) -> bool:
  """Whether a SentencePiece tokenizer adds a space before a text."""
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  prepend = {'type': 'Prepend', 'prepend': SPACE}
  normalizer = _steps(data['normalizer'], 'normalizers')
  cuts = _steps(data['pre_tokenizer'], 'pretokenizers')
  if normalizer == [replace] and cuts == [_GEMMA_SPLIT]:
    return False
  if not cuts and normalizer in ([replace], [prepend, replace]):
    return prepend in normalizer
  # Newer conversions write this. Unlike llama.cpp, it adds no space if the text begins with one.
  if normalizer in ([], [replace]) and [cut['type'] for cut in cuts] == ['Metaspace']:
    metaspace = cuts[0]
    if metaspace['replacement'] == SPACE and not metaspace.get('split', True):
      return metaspace.get('prepend_scheme', 'always') != 'never'
  raise _refusal("its normalizer or pre-tokenizer is not SentencePiece's")


def _byte_types(tokens: dict[str, int]) -> dict[str, int]:
  types = {f'<0x{byte:02X}>': BYTE for byte in range(256)}
  if missing := types.keys() - tokens.keys():
    raise _refusal(f'byte_fallback, but no token {min(missing)}')
  return types


def _scores(merges: list[tuple[str, ...]], normal: set[str]) -> dict[str, float]:
  """A score for each token that merges produce, such that llama.cpp merges in the same order.

  llama.cpp merges any two neighbours that form a token, best score first. Merges converted from a
  SentencePiece model are equivalent: they have all pairs of a token, one after the other.
  """
  scores: dict[str, float] = {}
  last = ''
  for left, right in merges:
    joined = left + right
    if joined != last and joined in scores:
      raise _refusal(f'merges that form {joined!r} are not adjacent')
    scores.setdefault(joined, float(-len(scores)))
    last = joined
  pairs = set(merges)
  for token in normal:
    for cut in range(1, len(token)):
      pair = (token[:cut], token[cut:])
      if pair[0] in normal and pair[1] in normal and pair not in pairs:
        raise _refusal(f'no merge of {pair[0]!r} and {pair[1]!r}, which together are a token')
  return scores
