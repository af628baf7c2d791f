"""Where a model comes from: a hub id, a Hugging Face directory, or a .gguf file."""

import dataclasses
import pathlib
from typing import Any

from models import gguf, gguf_tokenizer
from models.config import ModelConfig
from models.errors import InputError
from models.hf import SafetensorsReader, TensorReader, check_tensors, load_params, read_json
from models.hf_config import config_from_hf
from models.llama import Params

_HUB_FILES = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja']


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened checkpoint, headers checked, weights not read yet."""

  name: str
  config: ModelConfig
  reader: TensorReader
  path: pathlib.Path  # the directory or the .gguf file
  dtype: str  # of the stored weights; float32 for quantised files

  def generation(self) -> dict[str, Any]:
    """Fields of generation_config.json, such as a chat model's several end tokens; empty for GGUF."""
    path = self.path / 'generation_config.json'
    return read_json(path) if path.exists() else {}

  def load_params(self, dtype: Any = None) -> Params:
    """All parameters, tensor by tensor; `dtype` None keeps the stored one."""
    return load_params(self.config, self.reader, dtype)

  def load_tokenizer(self) -> Any:
    """The tokenizer; its own code is never run. Raises InputError if it cannot be read."""
    if self.path.suffix == '.gguf':
      tokenizer = gguf_tokenizer.load_tokenizer(self.path)
    else:
      tokenizer = _tokenizer_from_directory(self.path)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= self.config.vocab_size:
      raise InputError(
        f'{self.name}: the tokenizer has ids up to {highest}, the embedding only '
        f'{self.config.vocab_size} rows: tokenizer and weights do not belong together'
      )
    return tokenizer


def open_source(name: str) -> Source:
  """Opens a checkpoint by name and checks it without reading any weights.

  Raises InputError for a missing path, an unsupported architecture, a corrupt or truncated file,
  and for any missing, extra or mis-shaped tensor.
  """
  path = pathlib.Path(name).expanduser()
  if not name:
    raise InputError('model.source is empty: give a hub id, a Hugging Face directory or a .gguf file')
  reader: TensorReader
  if path.suffix == '.gguf':
    config, reader = gguf.read_config(path), gguf.open_tensors(path)
  else:
    path = path if path.exists() else _download(name)
    if path.is_file():
      raise InputError(f'model.source {name!r} is a file but not .gguf: give its directory')
    config, reader = config_from_hf(_read_config(path), str(path)), SafetensorsReader(path)
  check_tensors(config, reader)
  return Source(name, config, reader, path, reader.dtype())


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / 'config.json'
  if not path.exists():
    raise InputError(f'model.source {directory}: no config.json in this directory')
  return read_json(path)


def _download(name: str) -> pathlib.Path:
  if name.count('/') > 1 or name.startswith(('.', '/', '~')):
    raise InputError(f'model.source {name!r}: no such file or directory')
  import huggingface_hub  # only here: local sources need no hub
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
  except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f'model.source {name!r}: no such directory, and the hub does not give it ({reason})'
    ) from None


def _tokenizer_from_directory(directory: pathlib.Path) -> Any:
  # Slow to import, and only tokenizers are used of it; the model types it does not know are ours.
  from transformers import AutoTokenizer, logging

  logging.set_verbosity_error()

  try:
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(f'{directory}: the tokenizer cannot be loaded ({reason})') from None
