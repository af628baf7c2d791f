"""Trims a tokenizer to the tokens that a text uses, and those that these need.

A trimmed tokenizer gives the same tokens as the original on every text whose tokens it has; other words fall
apart into more tokens. BPE (Sennrich et al., arXiv 1508.07909) forms a token by merges, one pair at a time,
so the tokens on the way are kept too. All merges among kept tokens remain, in their order. Inside a token
they are applied as in the token alone, since no merge crosses its borders, so a word whose tokens are kept is
merged as before. Unigram (Kudo, arXiv 1804.10959) takes the segmentation of the highest score, which stays
the highest when others are removed.
"""

import itertools
import json
import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.gguf_tokenizer import SPACE

Json = dict[str, Any]
# Fields of generation_config.json with ids of ordinary tokens, which may be gone.
_OF_ORDINARY_TOKENS = (
  'suppress_tokens', 'begin_suppress_tokens', 'bad_words_ids', 'sequence_bias', 'forced_decoder_ids',
)  # fmt: skip
BYTES = {f'<0x{byte:02X}>' for byte in range(256)}  # SentencePiece's tokens of bytes


def needed_ids(tokenizer: Any, used: Collection[int]) -> list[int]:
  """The ids that a tokenizer trimmed to `used` has, in the order of their new ids.

  Besides the used ones: all added tokens, special or not; single characters, or with byte fallback the 256
  tokens of bytes, ASCII and the sign of a space; the tokens of the merges that form a used one.

  Raises InputError for a tokenizer that cannot be trimmed, with the reason.
  """
  data = _data(tokenizer)
  model, vocab = data['model'], _vocab(data['model'])
  added = {token['content']: token['id'] for token in data['added_tokens']}
  chosen = {*used, *tokenizer.all_special_ids}
  kept = {token for token, i in vocab.items() if i in chosen} | (added.keys() & vocab.keys())
  kept |= _alphabet(model, vocab)
  kept |= _formed(kept, merges_of(model)) if model['type'] == 'BPE' else _of_unigram(model)
  # Ids of added tokens that are not in the model's vocabulary follow it.
  inside = sorted(vocab[token] for token in kept)
  return inside + sorted(i for token, i in added.items() if token not in vocab)


def trim_tokenizer(tokenizer: Any, ids: list[int]) -> Any:
  """The tokenizer with only these ids, of `needed_ids`: the token of ids[i] has the id i.

  Chat template, special tokens and all other settings stay. Raises InputError if that cannot be done.
  """
  data, new = _data(tokenizer), {old: i for i, old in enumerate(ids)}
  expected = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
  data['model'] = _trimmed_model(data['model'], new)
  data['added_tokens'] = [token | {'id': new[token['id']]} for token in data['added_tokens']]
  for part in _parts(data['post_processor']):
    for token in part.get('special_tokens', {}).values():
      token['ids'] = [new[i] for i in token['ids']]
  if padding := data.get('padding'):
    data['padding'] = padding | {'pad_id': new[padding['pad_id']]}
  from transformers import AutoTokenizer  # slow to import, and needed for tokenizers only

  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save_pretrained(directory)
    write_text(pathlib.Path(directory, 'tokenizer.json'), json.dumps(data, ensure_ascii=False))
    found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
  if found.get_vocab() != expected:
    raise InputError(
      'the vocabulary cannot be trimmed, since its tokens cannot be renumbered: keep all of it'
    )
  return found


def ids_with_rows(config: ModelConfig, ids: list[int], tokenizer: Any) -> list[int]:
  """Those of the ids of `needed_ids` that the embedding has rows for.

  The others are added tokens such as Gemma 3's image token, which come last: they keep lying beyond it.
  Raises InputError for other ids without a row. tokenizer: the original one.
  """
  kept = [i for i in ids if i < config.vocab_size]
  beyond = ids[len(kept) :]
  if ids[: len(kept)] != kept or not {*beyond} <= tokenizer.added_tokens_decoder.keys():
    raise InputError(f'the tokenizer has the id {max(ids)}, but the embedding only {config.vocab_size} rows')
  return kept


def trimmed_generation(fields: dict[str, Any], ids: list[int]) -> dict[str, Any]:
  """Fields of generation_config.json with the new ids; an id that is gone is never generated, and left out.

  Raises InputError for fields with ids of ordinary tokens.
  """
  new, found = {old: i for i, old in enumerate(ids)}, dict(fields)
  for name, value in fields.items():
    if name in _OF_ORDINARY_TOKENS and value:
      raise InputError(f'generation_config.json has {name}, which names tokens by their ids: remove it')
    if not name.endswith('_token_id'):
      continue
    if isinstance(value, list):
      found[name] = [new[i] for i in value if i in new]
    elif value is not None:
      found[name] = new.get(value)
  return found


def _data(tokenizer: Any) -> Json:
  """The content of tokenizer.json. Raises InputError if it cannot be trimmed."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  data: Json = (
    json.loads(backend.to_str()) if backend else {'model': {'type': 'not of the tokenizers library'}}
  )
  model, kind = data['model'], data['model']['type']
  reasons = [f'it is {kind}, neither BPE nor Unigram'] if kind not in ('BPE', 'Unigram') else []
  for option in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
    reasons += [f'it has {option} = {value!r}'] if (value := model.get(option)) else []
  for part in _parts(data.get('post_processor')):
    ids = {i for token in part.get('special_tokens', {}).values() for i in token['ids']}
    if part['type'] not in ('ByteLevel', 'TemplateProcessing'):
      reasons.append(f'its post-processor is {part["type"]}')
    elif not ids <= tokenizer.added_tokens_decoder.keys():
      reasons.append('its post-processor adds a token that is not special')
  if reasons:
    raise InputError(
      f'the vocabulary cannot be trimmed, because of its tokenizer: {reasons[0]}: keep all of it'
    )
  return data


def _vocab(model: Json) -> dict[str, int]:
  """The model's tokens and their ids, without added tokens that are not in its vocabulary."""
  if model['type'] == 'BPE':
    return dict(model['vocab'])
  return {token: i for i, (token, _) in enumerate(model['vocab'])}


def _alphabet(model: Json, vocab: dict[str, int]) -> set[str]:
  """The tokens of which every text can be made, and the unknown token, as far as the vocabulary has them."""
  found = {token for token in vocab if len(token) == 1}
  if model['type'] == 'BPE' and model.get('byte_fallback'):  # other characters become bytes
    found = {token for token in found if token.isascii() or token == SPACE}
  return {token for token in (*found, *BYTES, model.get('unk_token')) if token in vocab}


def merges_of(model: Json) -> list[tuple[str, str]]:
  """The merges of a BPE model in a tokenizer.json, in either of its spellings."""
  pairs = (merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model['merges'])
  return [(left, right) for left, right in pairs]


def _formed(tokens: Collection[str], merges: list[tuple[str, str]]) -> set[str]:
  """All tokens that exist on the way from single characters to each of `tokens`."""
  ranks = {merge: rank for rank, merge in enumerate(merges)}
  found: set[str] = set()
  for token in tokens:
    pieces, seen = list(token), set(token)
    while len(pieces) > 1:
      rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(pieces)))
      if rank == len(ranks):
        break
      pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
      seen.add(pieces[at])
    if len(pieces) == 1:  # others are found whole, as with ignore_merges
      found |= seen
  return found


def _of_unigram(model: Json) -> set[str]:
  """The unknown token, and the one of the lowest score, which sets the score of unknown characters."""
  pieces, unknown = model['vocab'], model.get('unk_id')
  lowest = min(pieces, key=lambda piece: piece[1])[0]
  return {lowest, *([] if unknown is None else [pieces[unknown][0]])}


def _trimmed_model(model: Json, new: dict[int, int]) -> Json:
  if model['type'] == 'Unigram':
    pieces = [piece for i, piece in enumerate(model['vocab']) if i in new]
    unknown = model.get('unk_id')
    return model | {'vocab': pieces, 'unk_id': None if unknown is None else new[unknown]}
  vocab = {token: new[i] for token, i in model['vocab'].items() if i in new}
  merges = [pair for pair in merges_of(model) if {*pair, ''.join(pair)} <= vocab.keys()]
  return model | {'vocab': vocab, 'merges': merges}


def _parts(processor: Json | None) -> list[Json]:
  """The parts of a post-processor, which adds tokens such as BOS."""
  if processor is None:
    return []
  inner = processor.get('processors', [])
  return [part for one in inner for part in _parts(one)] if processor['type'] == 'Sequence' else [processor]
