"""transformers' from_pretrained of SOURCE and save_pretrained into OUT. For benchmarks/export.py."""

import json
import os
import pathlib
import sys

from transformers import AutoModelForCausalLM

from benchmarks.programs.export_usage import Peak, now, since


def run(source: str, out: str) -> None:
  peak, start = Peak(), now()
  model = AutoModelForCausalLM.from_pretrained(source, dtype='auto')
  model.save_pretrained(out, max_shard_size='5GB')
  for path in pathlib.Path(out).iterdir():
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
  print(json.dumps({'moved': since(start), 'anonymous_bytes': peak.bytes()}))


if __name__ == '__main__':
  run(*sys.argv[1:])
