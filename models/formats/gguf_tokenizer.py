"""Converts the tokenizer of a .gguf file to one that Hugging Face can save.

transformers' own conversion needs torch and ignores SmolLM's splitting of digits.
"""

import os
from collections.abc import Mapping
from typing import Any

from adapt_jax.models.formats.gguf_header import GgufFile, open_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of tokenizer.ggml.token_type
SPACE = '▁'  # how SentencePiece writes a space
_TURN_ENDS = ('<|eot_id|>', '<|im_end|>', '<|end|>', '<end_of_turn>')

# How text is split before merging, from the models' own tokenizer.json.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')
PATTERNS = {
  'llama-bpe': _LLAMA3,
  'dbrx': _LLAMA3,  # without ignore_merges, as is the next
  'smaug-bpe': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}
_BY_DIGIT = ('smollm', 'starcoder', 'refact')
_GPT2_STYLE = ('gpt-2', 'default', *_BY_DIGIT)  # ByteLevel has GPT-2's expression built in


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
  """The file's tokenizer as a `transformers.PreTrainedTokenizerFast`.

  Encoding adds BOS and EOS as the file specifies, by default as llama.cpp does. Raises any exception for what
  it cannot convert: `Source.load_tokenizer` is the boundary.
  """
  import transformers  # slow to import, and needed for tokenizers only

  file = open_file(path)
  tokens = file.field('tokenizer.ggml.tokens', list)
  types = file.field('tokenizer.ggml.token_type', list, [NORMAL] * len(tokens))
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise ValueError(f'{len(tokens)} tokenizer.ggml.tokens, of which only {len(vocab)} are different')
  kinds = {'gpt2': _byte_level, 'llama': _sentence_piece}
  backend = kinds[file.field('tokenizer.ggml.model', str)](file, vocab, types)
  special = _special_tokens(file, tokens)
  _add_whole_tokens(backend, tokens, types, special)
  template = file.field('tokenizer.chat_template', str, None)
  context = file.field(f'{file.field("general.architecture", str)}.context_length', int, None)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    clean_up_tokenization_spaces=False,
    **_add_bos_eos(file, backend, special),
    **special,
    **({'chat_template': template} if template else {}),
    **({'model_max_length': context} if context else {}),
  )


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
  """EOS and the end of a turn in chats, if the file has both, as Gemma's and Llama 3's may; else empty.

  As in llama.cpp, the end of a turn is recognised by its text if the file does not name it.
  """
  eos, turn = (metadata.get(f'tokenizer.ggml.{name}_token_id') for name in ('eos', 'eot'))
  tokens = metadata.get('tokenizer.ggml.tokens')
  if not isinstance(tokens, list):
    return []
  if not isinstance(turn, int) or not 0 <= turn < len(tokens):
    turn = next((tokens.index(token) for token in _TURN_ENDS if token in tokens), None)
  return [eos, turn] if isinstance(eos, int) and isinstance(turn, int) and eos != turn else []


def _byte_level(file: GgufFile, vocab: dict[str, int], types: list[int]) -> Any:
  """Byte-level BPE (GPT-2 and later)."""
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  name = file.field('tokenizer.ggml.pre', str)
  if name not in (*_GPT2_STYLE, *PATTERNS):
    known = ', '.join((*_GPT2_STYLE, *PATTERNS))
    raise ValueError(f'tokenizer.ggml.pre {name!r} is not supported, only {known}')
  merges = [tuple(merge.split(' ')) for merge in file.field('tokenizer.ggml.merges', list)]
  # Llama 3 has words in its vocabulary that its merges do not produce.
  backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == 'llama-bpe'))
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in _GPT2_STYLE)
  cuts: list[Any] = [to_bytes]
  if name in _BY_DIGIT:
    cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
  elif name in PATTERNS:
    cuts.insert(0, pre_tokenizers.Split(Regex(PATTERNS[name]), behavior='isolated'))
  backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
  if PATTERNS.get(name) == _QWEN2:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(file: GgufFile, vocab: dict[str, int], types: list[int]) -> Any:
  """SentencePiece BPE with byte fallback (LLaMA 1 and 2, Mistral, MobileLLM, Gemma)."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  scores = file.field('tokenizer.ggml.scores', list)
  unknown = [token for token, i in vocab.items() if types[i] == UNKNOWN]
  backend = Tokenizer(
    models.BPE(
      vocab,
      _merges(vocab, types, scores),
      unk_token=unknown[0] if unknown else None,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  normalizer: list[Any] = [normalizers.Replace(' ', SPACE)]
  decoder: list[Any] = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if file.field('tokenizer.ggml.add_space_prefix', bool, True):
    normalizer.insert(0, normalizers.Prepend(SPACE))
    decoder.append(decoders.Strip(' ', 1, 0))
  backend.normalizer = normalizers.Sequence(normalizer)
  backend.decoder = decoders.Sequence(decoder)
  return backend


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
  """Merges in SentencePiece's order: the pair whose joint token scores highest comes first.

  Equal scores are ordered by id, the order of training: some converters write one score for all.
  """
  normal = {token: i for token, i in vocab.items() if types[i] == NORMAL}
  # Only lengths that tokens have: to try all cuts of a very long token takes minutes.
  lengths = dict.fromkeys(sorted({len(token) for token in normal if token}, reverse=True))
  ranked = []
  for token, i in normal.items():
    for cut in lengths:  # a token's longest left part first, as in HF
      if len(token) - cut in lengths and token[:cut] in normal and token[cut:] in normal:
        ranked.append((-scores[i], i, token[:cut], token[cut:]))
  ranked.sort(key=lambda merge: merge[:2])
  return [(left, right) for _, _, left, right in ranked]


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
  keys = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  ids = {name: file.field(f'tokenizer.ggml.{key}_token_id', int, None) for name, key in keys.items()}
  of_id = dict(enumerate(tokens))
  return {f'{name}_token': of_id[i] for name, i in ids.items() if i is not None}


def _add_whole_tokens(backend: Any, tokens: list[str], types: list[int], special: dict[str, str]) -> None:
  """Registers the tokens that are matched whole in the text, before it is split."""
  from tokenizers import AddedToken

  controls, plain = [], []
  for token, kind in zip(tokens, types, strict=True):
    if kind in (CONTROL, UNKNOWN) or token in special.values():
      controls.append(AddedToken(token, special=True, normalized=False))
    elif kind == USER_DEFINED:
      plain.append(AddedToken(token, special=False, normalized=False))
  backend.add_special_tokens(controls)
  backend.add_tokens(plain)


def _add_bos_eos(file: GgufFile, backend: Any, special: dict[str, str]) -> dict[str, bool]:
  """Makes encoding add BOS and EOS as the file specifies; returns the settings for transformers."""
  from tokenizers import processors

  model, pre = file.metadata['tokenizer.ggml.model'], file.metadata.get('tokenizer.ggml.pre')
  default = {'bos': model == 'llama' or pre == 'llama-bpe', 'eos': False}
  parts = {'bos': '', 'eos': ''}
  for name in parts:
    if file.field(f'tokenizer.ggml.add_{name}_token', bool, default[name]):
      parts[name] = special[f'{name}_token']

  def template(sequence: str, type_id: int) -> list[str]:
    return [f'{part}:{type_id}' for part in (parts['bos'], sequence, parts['eos']) if part]

  backend.post_processor = processors.TemplateProcessing(
    single=template('$A', 0),
    pair=template('$A', 0) + template('$B', 1),
    special_tokens=[(token, backend.token_to_id(token)) for token in set(parts.values()) if token],
  )
  return {f'add_{name}_token': bool(part) for name, part in parts.items()}
