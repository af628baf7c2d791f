"""Opens a model from a hub id, a Hugging Face directory, or a .gguf file."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError, Unreachable, first_line, reading, unreachable
from adapt_jax.models.files import exists, local, read_json
from adapt_jax.models.formats import gguf_tokenizer
from adapt_jax.models.formats.fused import SplitReader
from adapt_jax.models.formats.gguf_model import GgufReader
from adapt_jax.models.formats.hf_config import config_from_hf
from adapt_jax.models.formats.hf_weights import (
  TensorReader,
  abstract_stored_params,
  check_tensors,
  leaves,
  load_params,
  stored_params,
)
from adapt_jax.models.formats.license import license_of_card, license_of_gguf
from adapt_jax.models.formats.safetensors import SafetensorsReader
from adapt_jax.models.network.llama import Params

_HUB_FILES = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja', 'README.md']
# Subfolders hold other formats; Mistral's and Meta's own files hold the same weights again.
_NOT_FROM_HUB = ['*/*', 'consolidated*']
_PAGES, _PAGE = 64, 4096  # of a file, to recognise its contents


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened checkpoint, with its headers checked and its weights not yet read."""

  name: str
  config: ModelConfig
  reader: TensorReader
  path: pathlib.Path  # the directory or the .gguf file
  dtype: str  # of the largest stored tensor; bfloat16 for quantised files, whose weights are read as float32
  # Fields of generation_config.json, such as a chat model's several end tokens; of GGUF only these.
  generation: dict[str, Any]
  license: dict[str, str]  # fields of a model card; empty if it is not known
  quantised: bool = False

  @property
  def hub(self) -> bool:
    """Whether `name` is an id of the hub, and not a path."""
    return self.path not in (local(self.name), local(self.name) / 'hf')

  def abstract_params(self, dtype: Any = None, shardings: Any = None) -> Params:
    """The tree of `load_params` as jax.ShapeDtypeStruct, read from the headers."""
    return abstract_stored_params(self.config, self.reader, dtype, shardings)

  def load_params(self, dtype: Any = None, shardings: Any = None) -> Params:
    """All parameters, tensor by tensor; `dtype` None keeps the stored one.

    With `shardings`, a tree of jax.sharding.Sharding like the parameters, each process reads the
    slices of its own devices.
    """
    return load_params(self.config, self.reader, dtype, shardings)

  def stored_params(self) -> Params:
    """All parameters as `StoredTensor`, each read from its file when it is converted to numpy."""
    return stored_params(self.config, self.reader)

  def stored_bytes(self) -> int:
    """Bytes of the files that hold the weights."""
    return sum(file.stat().st_size for file in self.reader.files)

  def model_digest(self) -> str:
    """SHA-256 of config.json, and of the sizes and 64 evenly spread pages of each file that holds weights.

    It tells models apart, but may miss a change of a few tensors: to read all bytes may take minutes.
    """
    found = hashlib.sha256((self.path / 'config.json').read_bytes() if self.path.is_dir() else b'')
    for path in self.reader.files:
      size = path.stat().st_size
      found.update(size.to_bytes(8, 'little'))
      with open(path, 'rb') as file:
        for i in range(_PAGES):
          file.seek(max(0, size - _PAGE) * i // (_PAGES - 1))
          found.update(file.read(_PAGE))
    return found.hexdigest()

  def load_tokenizer(self) -> Any:
    """The tokenizer; its own code is never run. Raises InputError if it cannot be read."""
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')  # it warns that PyTorch is absent
    load = gguf_tokenizer.load_tokenizer if self.path.suffix == '.gguf' else _tokenizer_from_directory
    with reading('tokenizer', self.path):
      tokenizer = load(self.path)
      # Added tokens may lie beyond the embedding, as Gemma 3's image token: what reads texts checks ids.
      vocab, extra = {*tokenizer.get_vocab().values()}, tokenizer.added_tokens_decoder.keys()
      ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
      ids = [*(vocab - extra), *(i for i in ends if i is not None), *tokenizer('a')['input_ids']]
      if (highest := max(ids, default=-1)) >= self.config.vocab_size:
        raise ValueError(
          f'has ids up to {highest}, but the embedding has only {self.config.vocab_size} rows: tokenizer and '
          f'weights do not match'
        )
      # Half a character, which no export could write, is refused before all work.
      json.dumps([tokenizer.init_kwargs, tokenizer.chat_template], ensure_ascii=False, default=repr).encode()
    return tokenizer


def open_source(name: str, field: str = 'model.source') -> Source:
  """Opens a checkpoint by name and checks it without reading any weights. `field`: its name in messages.

  Raises InputError for a missing path, an unsupported architecture, a corrupt or truncated file, and
  for any tensor that is missing, extra, mis-shaped or of an unsupported dtype.
  """
  path = _local(name, field)
  reader: TensorReader
  generation: dict[str, Any] = {}
  if path.suffix == '.gguf':
    reader = stored = GgufReader(path)
    config, license = stored.config, license_of_gguf(stored.metadata)
    if ends := gguf_tokenizer.end_ids(stored.metadata):
      generation = {'eos_token_id': ends}
  else:
    path = _of_run(path) if exists(path) else _download(name, field)
    config, reader = config_from_hf(_read_config(path, field), str(path)), SafetensorsReader(path)
    if config.traits.fused:
      reader = SplitReader(config, reader)
    if exists(path / 'generation_config.json'):
      generation = _generation(path / 'generation_config.json')
    license = license_of_card(path / 'README.md')
  check_tensors(config, reader)
  largest = max(leaves(config), key=lambda leaf: math.prod(leaf.shape))
  quantised = isinstance(reader, GgufReader) and reader.quantised
  dtype = 'bfloat16' if quantised else reader.dtype(largest.name)
  return Source(name, config, reader, path, dtype, generation, license, quantised)


def _generation(path: pathlib.Path) -> dict[str, Any]:
  """generation_config.json. Raises InputError for values that would end or sample texts wrongly."""
  with reading('', path, 'correct it'):
    values = read_json(path)
    json.dumps(values, ensure_ascii=False).encode()  # raises for half a character
    if values.get('top_k') == -1:  # as other programs write that it is off
      values['top_k'] = 0
    ends = values.get('eos_token_id') or []
    numbers = {name: values.get(name) for name in ('temperature', 'top_k', 'top_p', 'repetition_penalty')}
    bad = [name for name, x in numbers.items() if not (x is None or type(x) in (int, float) and x >= 0)]
    if bad or numbers['repetition_penalty'] == 0:
      raise ValueError(f'{(bad or ["repetition_penalty"])[0]} is no positive number')
    if any(type(end) is not int for end in (ends if isinstance(ends, list) else [ends])):
      raise ValueError('eos_token_id is no id or list of ids')
  return values


def open_config(name: str, field: str = 'model.source') -> ModelConfig:
  """Reads only the config of a checkpoint: from a hub id, a directory with config.json, or a .gguf file.

  Raises InputError as `open_source` does, but does not check the weights.
  """
  path = _local(name, field)
  if path.suffix == '.gguf':
    return GgufReader(path).config
  if exists(path):
    path = _of_run(path)
    return config_from_hf(_read_config(path, field), str(path))
  return _hub_config(name, field)


def _local(name: str, field: str) -> pathlib.Path:
  if not name:
    raise InputError(f'{field} is empty: give a hub id, a Hugging Face directory or a .gguf file')
  return local(name)


def _of_run(path: pathlib.Path) -> pathlib.Path:
  """The model in a run's workdir, which is in hf/; other paths are returned unchanged."""
  return path if exists(path / 'config.json') or not exists(path / 'hf/config.json') else path / 'hf'


def _read_config(directory: pathlib.Path, field: str) -> dict[str, Any]:
  path = directory / 'config.json'
  if not exists(path):
    found = sorted(directory.glob('*.gguf')) or sorted(directory.glob('gguf*/*.gguf'))
    remedy = f': give its file {str(found[0])!r}' if found else ''
    if sizes := sorted(directory.glob('sizes/*/run.json')):
      remedy = f': give one of its sizes, such as {str(sizes[0].parent)!r}'
    elif not found and exists(directory / 'checkpoints'):
      remedy = ', and this run has no export that can be read: write one with --mode=export'
    raise InputError(f'{field} {str(directory)!r}: no directory with config.json, and no .gguf file{remedy}')
  return read_json(path)


def _download(name: str, field: str) -> pathlib.Path:
  _hub_config(name, field)  # refuses an unsupported model after downloading only its config.json
  import huggingface_hub  # imported here: local sources do not need it

  return _fetch(
    name, field, huggingface_hub.snapshot_download, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB
  )


def _hub_config(name: str, field: str) -> ModelConfig:
  if name.count('/') > 1 or name.startswith(('.', '/', '~')):
    raise InputError(f'{field} {name!r}: no such file or directory')
  import huggingface_hub

  config = _fetch(name, field, huggingface_hub.hf_hub_download, filename='config.json')
  return config_from_hf(read_json(config), name)


def _fetch(name: str, field: str, download: Callable[..., Any], **options: Any) -> pathlib.Path:
  if offline := _no_hub():
    options['local_files_only'] = True
  try:
    return pathlib.Path(download(name, **options))
  except Exception as error:  # the hub's errors and those of its HTTP library share no other class
    reason = 'it cannot be reached, and its cache lacks the model' if offline else first_line(error)
    kind = Unreachable if offline or unreachable(error) else InputError
    raise kind(f'{field} {name!r}: no such directory, and the hub download failed ({reason})') from None


def _no_hub() -> bool:
  """Whether the hub's name cannot be resolved: asking it would take half a minute, its cache none."""
  import huggingface_hub

  # Proxies resolve it themselves, and in offline mode only the cache is asked anyway.
  if urllib.request.getproxies() or huggingface_hub.constants.HF_HUB_OFFLINE:
    return False
  try:
    socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, None)
  except OSError:
    return True
  return False


def _tokenizer_from_directory(directory: pathlib.Path) -> Any:
  """The tokenizer as tokenizer.json describes it, where that is byte-level BPE.

  Classes of transformers 5 that a tokenizer_config.json names build their own pre-tokenizer instead of
  reading the file's: GPT2Tokenizer leaves out the step that SmolLM2's has for digits.
  """
  # Slow to import, and used only for tokenizers; it warns about model types of ours that it does not know.
  from tokenizers import Tokenizer
  from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

  before = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if not found.is_fast or not exists(file := directory / 'tokenizer.json'):
      return found
    backend = Tokenizer.from_file(str(file))
    stored = _splitting(backend)
    if 'ByteLevel' in stored and stored != _splitting(found.backend_tokenizer):
      # The class may also know special tokens that the files do not name, such as EOS.
      special: dict[str, Any] = found.special_tokens_map
      special = {name: token for name, token in special.items() if token in backend.get_vocab()}
      return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, **special)
    return found
  finally:
    logging.set_verbosity(before)


def _splitting(backend: Any) -> str:
  """How a tokenizer changes and splits texts before its vocabulary counts; the vocabulary may be large."""
  parts = [part and part.__getstate__().decode() for part in (backend.normalizer, backend.pre_tokenizer)]
  found = str([*parts, getattr(backend.model, 'ignore_merges', None)])
  return re.sub('"trim_offsets":(true|false)', '', found)  # of positions, not of splitting
