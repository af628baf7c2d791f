"""Run by vLLM's Python: DIRECTORY PROMPTS.json OUT.json . On a CPU in one process, fp32, eager."""

import json
import os
import pathlib
import sys

os.environ |= {
  'HF_HUB_OFFLINE': '1',
  'VLLM_NO_USAGE_STATS': '1',
  'VLLM_ENABLE_V1_MULTIPROCESSING': '0',
  'VLLM_CPU_KVCACHE_SPACE': '1',  # GB
  'VLLM_CPU_OMP_THREADS_BIND': 'nobind',
}

from vllm import LLM, SamplingParams  # noqa: E402 (it reads the environment)


def main(directory, prompts, out):
  model = LLM(
    directory, trust_remote_code=True, dtype='float32', enforce_eager=True, max_model_len=128, max_num_seqs=4
  )
  rows = [{'prompt_token_ids': row} for row in json.loads(pathlib.Path(prompts).read_text())]
  sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, prompt_logprobs=0)
  answers = model.generate(rows, sampling, use_tqdm=False)
  result = {
    'logprobs': [
      [at[token].logprob for at, token in zip(r.prompt_logprobs[1:], r.prompt_token_ids[1:], strict=True)]
      for r in answers
    ],
    'tokens': [r.outputs[0].token_ids for r in answers],
  }
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
