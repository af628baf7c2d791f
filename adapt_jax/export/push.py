"""Uploads finished exports to the Hugging Face hub, each format to a repository of its own."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub.utils.tqdm import (
  are_progress_bars_disabled,
  disable_progress_bars,
  enable_progress_bars,
)

from adapt_jax.config.options import ExportOptions
from adapt_jax.export.formats import FORMATS
from adapt_jax.machine.processes import say, shows
from adapt_jax.machine.progress import phase
from adapt_jax.models.errors import InputError, Unreachable, unreachable

# An earlier upload may have left these; loaders would mix them with the new files.
_REPLACED = [
  '*.safetensors', '*.safetensors.index.json', '*.gguf', '*.py',
  'tokenizer*', 'vocab.json', 'merges.txt', 'added_tokens.json', 'special_tokens_map.json', 'chat_template*',
]  # fmt: skip
_AGAIN = 'run the same command again, which only uploads'


def repositories(options: ExportOptions) -> dict[str, str]:
  """Format -> the repository that it is uploaded to; empty without `export.push`."""
  return {name: options.push + FORMATS[name].suffix for name in options.formats} if options.push else {}


@contextlib.contextmanager
def _asking(options: ExportOptions, what: str, again: str = '') -> Iterator[None]:
  """Turns any error of the hub into one InputError: its library and that of HTTP share no other class."""
  try:
    yield
  except Exception as error:
    reasons = [' '.join(str(e).split()) or type(e).__name__ for e in (error, error.__cause__) if e]
    kind = Unreachable if unreachable(error) else InputError
    raise kind(
      f'export.push = {options.push!r}: {what} ({", ".join(dict.fromkeys(reasons))}): check name and '
      f'network, run `hf auth login`, or set HF_TOKEN to a token that may write{again}'
    ) from None


def check_hub(options: ExportOptions) -> None:
  """Creates the repositories that do not exist. Raises InputError if the user may not write to one."""
  hub = huggingface_hub.HfApi()
  for repo in repositories(options).values():
    with _asking(options, f'{repo} cannot be written'):
      hub.create_repo(repo, exist_ok=True)
      hub.auth_check(repo, write=True)


def push(options: ExportOptions, directory: pathlib.Path, again: str = _AGAIN) -> None:
  """Uploads DIRECTORY/<format> for each format; does nothing without `export.push`.

  In a repository, the weights and code of an earlier upload are replaced, and other files are kept. Only one
  process may call it. again: what repeats only the upload, for the message. Raises InputError for a format
  that was not written, and if the hub refuses or cannot be reached; the exports stay as they are.
  """
  hub, repos = huggingface_hub.HfApi(), repositories(options)
  if missing := [directory / name for name in repos if not (directory / name).is_dir()]:
    raise InputError(
      f'export.push = {options.push!r}: there is no {missing[0]} to upload: write it with '
      f'--mode=export --config.model.source={directory}'
    )
  for name, repo in repos.items():
    folder = directory / name
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    say(f'uploading {folder}, {size:,.1f} MB, to {repo}')
    failed = f'{folder} was not uploaded to {repo}'
    with _asking(options, failed, f'; the exports are complete: {again}'), _progress(f'uploading to {repo}'):
      hub.create_repo(repo, exist_ok=True)
      hub.upload_folder(
        repo_id=repo, folder_path=folder, delete_patterns=_REPLACED, commit_message='Upload by adapt-jax'
      )
    say(f'{folder}: uploaded to {huggingface_hub.constants.ENDPOINT}/{repo}')


@contextlib.contextmanager
def _progress(title: str) -> Iterator[None]:
  """On a terminal, the hub's own display, which counts bytes; elsewhere our lines."""
  if shows() and sys.stderr.isatty():
    yield
    return
  hidden = are_progress_bars_disabled()
  disable_progress_bars()
  try:
    with phase(title):
      yield
  finally:
    if not hidden:
      enable_progress_bars()
