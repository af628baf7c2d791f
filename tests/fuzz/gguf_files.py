"""GGUF files: a llama with widths that differ, and a quantised qwen2 with SentencePiece's kind of tokens."""

import pathlib
import random

from adapt_jax.export.gguf import write_gguf
from adapt_jax.machine.processes import silent
from adapt_jax.models.config import LayerShape
from adapt_jax.models.formats.gguf_architectures import ARCHITECTURES
from adapt_jax.models.formats.gguf_header import GgufFile, open_file
from tests.fuzz.cases import Kind, Values
from tests.fuzz.gguf_parts import ARRAY, CODES, STRING, Field, Parts, put_together, take_apart
from tests.fuzz.models import observe_model, warm_model
from tests.fuzz.mutations import damage_bytes, odd_value, replace_file
from tests.support.helpers import random_params, tiny_config
from tests.support.tokenizers_for_tests import CHATML_DEFAULT_SYSTEM, tiny_tokenizer

_NAME = 'model.gguf'
# The end of a metadata key -> the values that it gives.
_GIVES = {
  '.architecture': ('config.*', 'tensor *'),  # other architectures keep q and k in another order
  '.family': ('config.family',),
  '.layer_norm_rms_epsilon': ('config.rms_norm_eps',),
  '.freq_base': ('config.rope',),
  '.llama3_scaling': ('config.rope',),
  '.context_length': ('config.max_position', 'tokenizer *'),
  # The ends of a text: EOS and the end of a turn, which is found by its text among the tokens.
  '.eos_token_id': ('generation',),
  '.eot_token_id': ('generation',),
  '.tokens': ('generation',),
}
_TOKENIZER = ('tokenizer *', 'stops')


class GgufFileKind(Kind):
  """One .gguf file of the given tensor type."""

  def __init__(self, name: str, tensor_type: str, share: float):
    self.name, self._type, self.share = name, tensor_type, share

  def make(self, place: pathlib.Path) -> None:
    tokenizer = tiny_tokenizer(CHATML_DEFAULT_SYSTEM)
    if self._type == 'F32':
      config = tiny_config(vocab_size=len(tokenizer))
    else:
      shapes = (LayerShape(4, 2, 96),) * 2
      config = tiny_config('qwen2', shapes, vocab_size=len(tokenizer), hidden_size=64, head_dim=16)
    path = place / _NAME
    with silent():
      write_gguf(config, random_params(config), path, tokenizer=tokenizer, kind=self._type, name='tiny')
    content = path.read_bytes()
    parts = take_apart(content)
    assert put_together(parts) == content
    if self._type != 'F32':
      path.write_bytes(put_together(_with_scores(parts)))

  def warm(self, base: pathlib.Path) -> None:
    warm_model(base / _NAME)

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    path = place / _NAME
    act = rng.choices(['field', 'tensor', 'header', 'data', 'file'], [45, 20, 20, 10, 5])[0]
    if act == 'file':
      return replace_file(path, rng)
    content = path.read_bytes()
    parts = take_apart(content)
    header = len(content) - len(parts.data)
    if act == 'field':
      act = _damage_field(parts, rng)
    elif act == 'tensor':
      act = _damage_tensor(parts, rng)
    if act == 'header':
      content = damage_bytes(content, rng, rng.choice([header, 200, 32]))
    elif act == 'data':
      content = content[:header] + damage_bytes(parts.data, rng)
    else:
      content = put_together(parts)
    path.write_bytes(content)
    return act

  def observe(self, place: pathlib.Path) -> Values:
    return observe_model(place / _NAME)

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """No part has a checksum: what may differ is what a damaged field or a damaged tensor says."""
    now, then = open_file(place / _NAME), open_file(base / _NAME)
    found = dict[str, str]()
    for key in now.metadata.keys() | then.metadata.keys():
      if repr(now.metadata.get(key)) != repr(then.metadata.get(key)):
        names = [name for end, names in _GIVES.items() if key.endswith(end) for name in names]
        names += _TOKENIZER if key.startswith('tokenizer.') else ()
        found |= dict.fromkeys(names, '')
    # The names of damaged tensors are those of the file; that of the rotary frequencies gives the config's.
    arch = ARCHITECTURES[then.metadata['general.architecture']]
    damaged = {
      name for name in now.tensors.keys() | then.tensors.keys() if _data(now, name) != _data(then, name)
    }
    if 'rope_freqs.weight' in damaged:
      found['config.rope'] = ''
    if 'output.weight' in damaged:
      found['config.tie_embeddings'] = ''  # a file without one says that it is the embedding
    if damaged:
      found |= {f'tensor {name}': '' for name in (arch.hf_name(x) or x for x in damaged)} | {'dtype': ''}
    return found | {'written': ''}


def _with_scores(parts: Parts) -> Parts:
  """The file with SentencePiece's kind of tokenizer, which has a score for each token instead of merges."""
  parts.field('tokenizer.ggml.model').value = b'llama'
  count = len(parts.field('tokenizer.ggml.tokens').value)
  parts.fields = [f for f in parts.fields if f.key not in (b'tokenizer.ggml.pre', b'tokenizer.ggml.merges')]
  parts.fields.append(Field(b'tokenizer.ggml.scores', ARRAY, [float(-i) for i in range(count)], 6))
  return parts


def _data(file: GgufFile, name: str) -> tuple[object, ...]:
  """Type, shape and bytes of a tensor; () if there is none."""
  if (tensor := file.tensors.get(name)) is None:
    return ()
  with open(file.path, 'rb') as opened:
    opened.seek(tensor.offset)
    return tensor.type, tensor.shape, opened.read(tensor.nbytes)


def _damage_field(parts: Parts, rng: random.Random) -> str:
  """Changes, removes or repeats a metadata field; those that are not words of the tokenizer more often."""
  field = rng.choice(parts.fields)
  key = field.key.decode('utf-8', 'replace')
  act = rng.choice(['value', 'value', 'value', 'value', 'remove', 'key', 'twice', 'type'])
  if act == 'remove':
    parts.fields.remove(field)
  elif act == 'key':
    field.key = rng.choice(
      [b'', b'\xff', field.key[:-1], b'a\nb', field.key + b'\0', rng.choice(parts.fields).key]
    )
  elif act == 'twice':
    parts.fields.append(Field(field.key, field.kind, _other(field, rng), field.item))
  elif act == 'type':
    _change_type(field, rng)
  else:
    field.value = _other(field, rng)
  return f'{key}: {act}'


def _change_type(field: Field, rng: random.Random) -> None:
  """Another type, with a value of it; an array of one, or of arrays, which llama.cpp does not write."""
  if rng.random() < 0.3:
    field.value = field.value if field.kind == ARRAY else [field.value] * rng.choice([0, 1, 2, 3, 4, 1000])
    field.item, field.kind = (field.item if field.kind == ARRAY else field.kind), ARRAY
    field.item = rng.choice([field.item, field.item, *CODES, ARRAY, 13, 2**32 - 1])
    field.value = [_plain(value, field.item) for value in field.value]
    return
  field.kind = rng.choice([*CODES, STRING, 13, 255])
  field.value = _plain(odd_value(rng), field.kind)


def _plain(value: object, kind: int) -> object:
  """The value as one that can be packed as this type."""
  if kind == STRING:
    return value if isinstance(value, (bytes, str)) else repr(value)
  return value if isinstance(value, (int, float)) else 1


def _other(field: Field, rng: random.Random) -> object:
  """An odd value of the field's own type."""
  if field.kind != ARRAY:
    if field.kind == STRING:
      return rng.choice([damage_bytes(field.value, rng), _plain(odd_value(rng), STRING), b'\xff', b''])
    return _plain(odd_value(rng, field.value), field.kind)
  values = list(field.value)
  act = rng.choice(['one', 'one', 'shorter', 'longer', 'empty', 'same', 'exchange', 'huge'])
  at = rng.randrange(len(values)) if values else 0
  if not values or act == 'empty':
    return []
  if act == 'one':
    values[at] = _other(Field(b'', field.item, values[at]), rng)
  elif act == 'shorter':
    del values[at:]
  elif act == 'longer':
    values += values[: rng.choice([1, at + 1])]
  elif act == 'same':
    values[at] = values[0]
  elif act == 'exchange':
    values[at], values[-1] = values[-1], values[at]
  elif field.item == STRING:
    values[at] = b'ab' * rng.choice([1000, 10_000, 200_000])
  else:
    values *= 100
  return values


def _damage_tensor(parts: Parts, rng: random.Random) -> str:
  info, other = rng.choice(parts.infos), rng.choice(parts.infos)
  name = info.name.decode()
  act = rng.choice(['name', 'dims', 'kind', 'offset', 'exchange', 'remove', 'twice', 'more'])
  if act == 'name':
    info.name = rng.choice(
      [b'', b'\xff', b'a\nb', other.name, info.name + b'x', b'blk.9' * 9, b'rope_freqs.weight']
    )
  elif act == 'dims':
    rows = info.dims
    choices = [rows[::-1], [*rows, 1], [1, *rows], [], [0], [0, *rows[1:]], [2**63, 2], [*rows, 1, 1, 1, 1]]
    info.dims = rng.choice([*choices, [2**32, 2**32], [rows[0] * 2, *rows[1:]], rows[:1]])
  elif act == 'kind':
    info.kind = rng.choice([0, 1, 2, 3, 8, 12, 30, 31, 99, 2**32 - 1])
  elif act == 'offset':
    info.offset += rng.choice([1, 4, 32, -32, 2**40, 2**63, len(parts.data)])
  elif act == 'exchange':
    info.offset, other.offset = other.offset, info.offset
  elif act == 'remove':
    parts.infos.remove(info)
  elif act == 'twice':
    parts.infos.append(info)
  else:
    parts.infos.append(type(info)(rng.choice([b'x', b'output.weight', b'blk.0.attn_q.bias']), [4], 0, 0))
  return f'tensor {name}: {act}'


KINDS = (GgufFileKind('gguf', 'F32', 0.2), GgufFileKind('gguf-q8', 'Q8_0', 0.1))
