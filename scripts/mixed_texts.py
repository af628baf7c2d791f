"""Makes training and held-out text of several kinds for configs/studies.py, from data sets in one directory.

    python scripts/mixed_texts.py DATASETS [directory, by default data/mixed/]

    train/web.jsonl  valid/web.jsonl     c4/c4_train_1200.jsonl, a fourth of the documents held out
    train/wiki.txt   valid/wiki.txt      wikitext-2/wiki.train.tokens and wiki.valid.tokens
    train/chat.jsonl valid/chat.jsonl    instruct/gpteacher_roleplay.json, a fourth of conversations held out
    fiction, edu, code, instructions     recovery/fiction, edu, code and chat.jsonl, where it exists

Each document is whole and in one part only. Conversations with the same instruction go to the same part.
"""

import hashlib
import json
import pathlib
import shutil
import sys
from typing import Any

HELD_OUT = 4
PARTS, NAMES = ('train', 'valid'), ('wiki.txt', 'web.jsonl', 'chat.jsonl')
MORE = {'fiction': 'fiction', 'edu': 'edu', 'code': 'code', 'instructions': 'chat'}


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  if not 1 <= len(arguments) <= 2:
    print('mixed_texts: name the directory of the data sets, and maybe one to write to', file=sys.stderr)
    return 2
  source = pathlib.Path(arguments[0])
  root = pathlib.Path(__file__).resolve().parent.parent
  target = pathlib.Path(arguments[1]) if arguments[1:] else root / 'data/mixed'
  try:
    write(source, target)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    print(f'mixed_texts: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  return 0


def write(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes both parts, or neither on an error.

  Raises OSError if a data set is missing or `target` holds other files, and ValueError, KeyError, TypeError
  or AttributeError if a data set has another format.
  """
  ours = {f'{part}/{name}' for part in PARTS for name in (*NAMES, *(f'{kind}.jsonl' for kind in MORE))}
  ours |= set(PARTS)
  if target.exists() and {path.relative_to(target).as_posix() for path in target.rglob('*')} - ours:
    raise OSError(f'{target} holds other files: name a new directory')
  lines = (source / 'c4/c4_train_1200.jsonl').read_text(encoding='utf-8').strip().split('\n')
  web = [{'text': json.loads(line)['text']} for line in lines]
  chats = json.loads((source / 'instruct/gpteacher_roleplay.json').read_text(encoding='utf-8'))
  new = target.with_name(f'.{target.name}.tmp')
  shutil.rmtree(new, ignore_errors=True)
  try:
    for part in PARTS:
      (new / part).mkdir(parents=True)
      shutil.copyfile(source / f'wikitext-2/wiki.{part}.tokens', new / part / 'wiki.txt')
    _split(new, 'web.jsonl', web, 'text')
    kept = [{k: chat[k] for k in ('instruction', 'input', 'output')} for chat in chats]
    _split(new, 'chat.jsonl', kept, 'instruction')
    for kind, file in MORE.items() if (source / 'recovery').is_dir() else ():
      lines = (source / f'recovery/{file}.jsonl').read_text(encoding='utf-8').strip().split('\n')
      _split(new, f'{kind}.jsonl', [json.loads(line) for line in lines])
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _split(directory: pathlib.Path, name: str, rows: list[dict[str, Any]], key: str = '') -> None:
  """Puts about one of `HELD_OUT` rows into valid, chosen by the hash of its `key` or of all of it."""
  parts: dict[str, list[str]] = {'train': [], 'valid': []}
  for row in rows:
    digest = hashlib.sha256((row[key] if key else json.dumps(row)).encode()).digest()
    parts['train' if digest[0] % HELD_OUT else 'valid'].append(json.dumps(row))
  for part, found in parts.items():
    (directory / part / name).write_text('\n'.join(found) + '\n', encoding='utf-8')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
