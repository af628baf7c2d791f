"""Models: Hugging Face directories, of one file and of shards, and what is read from any model."""

import dataclasses
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import safetensors

from adapt_jax.data.documents import Document
from adapt_jax.data.tokenise import encode_all, encode_prompts
from adapt_jax.data.windows import check_vocab
from adapt_jax.export.card import model_card
from adapt_jax.export.hf import write_hf
from adapt_jax.export.writer import LINEAGE, lineage
from adapt_jax.generation.sampling import stop_ids
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.hf_weights import host_tensors, save_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.backend import made_for
from tests.fuzz.cases import Kind, Values, digest
from tests.fuzz.mutations import damage_bytes, damage_file
from tests.support.helpers import random_params, tiny_config
from tests.support.tokenizers_for_tests import CHATML_DEFAULT_SYSTEM, tiny_tokenizer

_CHAT = [{'role': 'user', 'content': 'What is it?'}, {'role': 'assistant', 'content': 'The best of times.'}]
_TEXT = 'the dog sleeps on, "1234"\n \t déjà vu 🙂 </s><|im_end|>'
# A field of config.json -> the fields of the decoder's config that it gives. Those that give shapes are not
# here: other shapes are not those of the weights.
_GIVES = {
  'model_type': 'family',
  'rms_norm_eps': 'rms_norm_eps',
  'rope_theta': 'rope',
  'rope_scaling': 'rope',
  'rope_parameters': 'rope',
  'max_position_embeddings': 'max_position',
}


def observe_model(path: pathlib.Path) -> Values:
  """Config, weights, tokenizer and settings of generation; and an export of them, with its card."""
  source = open_source(str(path))
  config = source.config
  found = {f'{f.name}': repr(getattr(config, f.name)) for f in dataclasses.fields(config)}
  found['dtype'] = source.dtype
  for leaf, array in host_tensors(config, source.stored_params()):
    found[f'tensor {leaf.name}'] = tensor_digest(array.dtype.name, array.tobytes())
  tokenizer = source.load_tokenizer()
  found['tokenizer plain'] = _ids(tokenizer(_TEXT)['input_ids'], config.vocab_size)
  found['tokenizer prompt'] = _ids(encode_prompts(['the dog'], tokenizer, True)[0], config.vocab_size)
  documents = [Document('chat', _CHAT), Document('text', _TEXT)]
  encoded = next(encode_all(iter([documents]), tokenizer))
  if encoded.refused:
    raise InputError(encoded.refused[0])
  found['tokenizer chat'] = _ids(encoded.tokens.tolist(), config.vocab_size) + digest(
    encoded.targets.tobytes()
  )
  found['tokenizer decoded'] = repr(tokenizer.decode(range(0, config.vocab_size, 7)))
  found['generation'] = json.dumps(source.generation, sort_keys=True)
  found['stops'] = repr(sorted(stop_ids(source.generation, tokenizer)))
  found['lineage'] = json.dumps(lineage(source), sort_keys=True)
  report: Any = lineage(source) or {'model': {'source': 'given', 'params_before': count_params(config)}}
  with tempfile.TemporaryDirectory() as new:
    place = pathlib.Path(new, 'hf')
    write_hf(config, source.stored_params(), place, tokenizer=tokenizer, generation=source.generation)
    files = sorted(file.name for file in place.iterdir())
    write_text(place / 'README.md', model_card(report, config, files))
    found['written'] = digest(*[(place / file).read_bytes() for file in (*files, 'README.md')])
  return found


def warm_model(path: pathlib.Path) -> None:
  """Traces the shapes of the undamaged model, which most cases ask for, and imports its tokenizer's class."""
  with made_for('cpu'):
    open_source(str(path)).load_tokenizer()


def _ids(ids: list[int], vocab_size: int) -> str:
  check_vocab(max(ids, default=0), vocab_size, 'the text')
  if min(ids, default=0) < 0:
    raise ValueError(f'negative ids: {ids}')
  return json.dumps(ids)


def tensor_digest(dtype: str, data: bytes) -> str:
  return digest(dtype, data)


class ModelDirectory(Kind):
  """A pruned llama in shards, as mode export writes it, or a stock qwen2 in one file."""

  def __init__(self, name: str, sharded: bool, share: float):
    self.name, self.sharded, self.share = name, sharded, share

  def make(self, place: pathlib.Path) -> None:
    tokenizer = tiny_tokenizer(CHATML_DEFAULT_SYSTEM)
    if not self.sharded:
      config = tiny_config('qwen2', vocab_size=len(tokenizer) + 8, layers=((tiny_config().layers[0]),) * 2)
      write_hf(config, random_params(config), place, tokenizer=tokenizer, generation={'eos_token_id': [1, 3]})
      return
    config = tiny_config(vocab_size=len(tokenizer), output_bias=True)
    params = random_params(config, dtype='bfloat16')
    write_hf(config, params, place, tokenizer=tokenizer, generation={'temperature': 0.7})
    (place / 'model.safetensors').unlink()
    save_params(config, params, place, shard_bytes=60_000)
    (place / LINEAGE).write_text(json.dumps({'model': {'source': 'somewhere'}, 'stages': []}))
    shutil.rmtree(place / '__pycache__', ignore_errors=True)

  def warm(self, base: pathlib.Path) -> None:
    warm_model(base)

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    files = [path for path in sorted(place.iterdir()) if path.suffix != '.py']
    weights = [path for path in files if path.suffix == '.safetensors']
    if rng.random() < 0.35:
      path = rng.choice(weights)
      if rng.random() < 0.5:
        return _damage_header(path, rng)
      data = path.read_bytes()
      within = rng.choice([8, 8 + int.from_bytes(data[:8], 'little'), None])
      path.write_bytes(damage_bytes(data, rng, within))
      return f'{path.name}: bytes'
    chosen = rng.choices(files, [4 if f.name == 'config.json' else 1 for f in files])[0]
    return damage_file(chosen, rng)

  def observe(self, place: pathlib.Path) -> Values:
    return observe_model(place)

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """No file has a checksum: each value may be the one that a damaged file says, and no other value."""
    found = {f'{_GIVES[field]}': '' for field in _changed(place, base, 'config.json') & _GIVES.keys()}
    for path in place.glob('*.safetensors'):
      for name, tensor in safetensors.deserialize(path.read_bytes()):
        dtype = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}.get(tensor['dtype'], '')
        found[f'tensor {name}'] = tensor_digest(dtype, bytes(tensor['data']))
        found['dtype'] = ''  # that of the largest tensor
    names = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja')
    if any(_bytes(place / name) != _bytes(base / name) for name in names):
      found |= {'tokenizer *': '', 'stops': ''}  # other words: all ids still have rows, as `_ids` checks
    if _bytes(place / 'generation_config.json') != _bytes(base / 'generation_config.json'):
      said = _json(place / 'generation_config.json') if (place / 'generation_config.json').exists() else {}
      found |= {'generation': json.dumps(said, sort_keys=True), 'stops': ''}
    if _bytes(place / LINEAGE) != _bytes(base / LINEAGE):
      found['lineage'] = ''  # a model without one is somebody else's
    return found | {'written': ''}  # all of these values


def _damage_header(path: pathlib.Path, rng: random.Random) -> str:
  """Edits the JSON of a safetensors header; its length and the data stay right."""
  data = path.read_bytes()
  end = 8 + int.from_bytes(data[:8], 'little')
  header: dict[str, Any] = json.loads(data[8:end])
  names = [name for name in header if name != '__metadata__']
  one, other = header[rng.choice(names)], header[rng.choice(names)]
  act = rng.choice(['swap', 'dtype', 'shape', 'offsets', 'name', 'metadata', 'extra', 'remove'])
  if act == 'swap':
    one['data_offsets'], other['data_offsets'] = other['data_offsets'], one['data_offsets']
  elif act == 'dtype':
    one['dtype'] = rng.choice(['F32', 'F16', 'BF16', 'I32', 'F8_E4M3', 'F64', '', None, 5, 'f32'])
  elif act == 'shape':
    shape = one['shape']
    one['shape'] = rng.choice(
      [shape[::-1], [*shape, 1], [1, *shape], [], [0], [2**63], [-1], None, shape[:1]]
    )
  elif act == 'offsets':
    first, last = one['data_offsets']
    one['data_offsets'] = rng.choice(
      [[last, first], [first], [first, last + 2], [first - 2, last], [0, 2**64]]
    )
  elif act == 'name':
    header[rng.choice(['', 'x', 'a\nb', '\x1b[31m', '\ud800', 'é' * 5000, '__metadata__'])] = header.pop(
      names[0]
    )
  elif act == 'metadata':
    header['__metadata__'] = rng.choice([None, {}, {'a': 1}, {'a': 'b'}, [], {'format': '\0'}])
  elif act == 'extra':
    header['more'] = {'dtype': 'F32', 'shape': [0], 'data_offsets': [len(data) - end] * 2}
  else:
    del header[names[0]]
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[end:])
  return f'{path.name}: {act} in the header'


def _bytes(path: pathlib.Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


def _json(path: pathlib.Path) -> Any:
  return json.loads(path.read_text(encoding='utf-8'))


def _changed(place: pathlib.Path, base: pathlib.Path, name: str) -> set[str]:
  """The fields of a JSON file that differ."""
  now, then = _json(place / name), _json(base / name)
  return {
    field for field in now.keys() | then.keys() if json.dumps(now.get(field)) != json.dumps(then.get(field))
  }


KINDS = (ModelDirectory('model', False, 0.2), ModelDirectory('shards', True, 0.2))
