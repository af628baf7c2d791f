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
_REPLACED = (
  '*.safetensors', '*.safetensors.index.json', '*.gguf', '*.py',
  'tokenizer*', 'vocab.json', 'merges.txt', 'added_tokens.json', 'special_tokens_map.json', 'chat_template*',
)  # fmt: skip
_AGAIN = 'run the same command again, which only uploads'


def repositories(options: ExportOptions) -> dict[str, str]:
  """Format -> the repository that it is uploaded to; empty without `export.push`."""
  return {name: options.push + FORMATS[name].suffix for name in options.formats} if options.push else {}


def check_token(options: ExportOptions) -> None:
  """Raises InputError if there is something to upload, and no token that the hub accepts."""
  if not options.push:
    return
  if huggingface_hub.get_token() is None:
    raise InputError(
      f'export.push = {options.push!r}, but there is no token of the hub: run `hf auth login`, set '
      f'HF_TOKEN, or leave push empty'
    )
  try:
    huggingface_hub.HfApi().whoami()
  except Exception as error:  # as in `push`
    raise _refusal(options, options.push, error) from None


def check_hub(options: ExportOptions) -> None:
  """Creates the repositories that do not exist, and checks that the user may write to all of them.

  Raises InputError without a token, and for a repository that refuses this user or cannot be reached.
  """
  check_token(options)
  for repo in repositories(options).values():
    try:
      hub = huggingface_hub.HfApi()
      hub.create_repo(repo, exist_ok=True)
      hub.auth_check(repo, write=True)
    except Exception as error:  # as in `push`
      raise _refusal(options, repo, error) from None


def _refusal(options: ExportOptions, repo: str, error: Exception) -> InputError:
  kind = Unreachable if unreachable(error) else InputError
  return kind(
    f'export.push = {options.push!r}: {repo} cannot be written ({_reason(error)}): check name and '
    f'network, run `hf auth login`, or set HF_TOKEN to a token that may write'
  )


def push(options: ExportOptions, directory: pathlib.Path, again: str = _AGAIN) -> None:
  """Uploads DIRECTORY/<format> for each format; does nothing without `export.push`.

  In a repository, the weights and code of an earlier upload are replaced, and other files are kept. Only one
  process may call it. again: what repeats only the upload, for the message. Raises InputError for a format
  that was not written, and if the hub refuses or cannot be reached; the exports stay as they are.
  """
  repos = repositories(options)
  for name in repos:
    if not (directory / name).is_dir():
      raise InputError(
        f'export.push = {options.push!r}: there is no {directory / name} to upload: write it with '
        f'--mode=export --config.model.source={directory}'
      )
  try:
    check_hub(options)
  except InputError as error:
    raise type(error)(f'{error}; the exports are complete: {again}') from None
  for name, repo in repos.items():
    folder = directory / name
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    say(f'uploading {folder}, {size:,.1f} MB, to {repo}')
    try:
      with _progress(f'uploading to {repo}'):
        huggingface_hub.HfApi().upload_folder(
          repo_id=repo, folder_path=folder, delete_patterns=[*_REPLACED], commit_message='Upload by adapt-jax'
        )
    except Exception as error:  # the hub's errors and those of its HTTP library share no other class
      kind = Unreachable if unreachable(error) else InputError
      raise kind(
        f'export.push = {options.push!r}: {folder} was not uploaded to {repo} ({_reason(error)}); '
        f'the exports are complete: {again}'
      ) from None
    say(f'{folder}: uploaded to {huggingface_hub.constants.ENDPOINT}/{repo}')


def _reason(error: Exception) -> str:
  """In one line, with the cause: an error of the storage only names the file."""
  found = [' '.join(str(e).split()) or type(e).__name__ for e in (error, error.__cause__) if e is not None]
  return ', '.join(dict.fromkeys(found))


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
