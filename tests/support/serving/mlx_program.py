"""Run by MLX-LM's Python: DIRECTORY PROMPTS.json OUT.json."""

import json
import pathlib
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load, stream_generate


def main(directory, prompts, out):
  model, tokenizer = load(directory, trust_remote_code=True, tokenizer_config={'trust_remote_code': True})
  tokenizer._eos_token_ids = set()  # continues after an end token
  rows = json.loads(pathlib.Path(prompts).read_text())
  scores = nn.log_softmax(model(mx.array(rows)).astype(mx.float32))[:, :-1]
  result = {
    'logprobs': mx.take_along_axis(scores, mx.array(rows)[:, 1:, None], -1)[..., 0].tolist(),
    'tokens': [[r.token for r in stream_generate(model, tokenizer, row, max_tokens=16)] for row in rows],
  }
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
