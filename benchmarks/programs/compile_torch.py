"""torch.compile of a forward and backward pass with the same widths. For benchmarks/compile_time.py --peer.

transformers' Llama with per-layer widths, forward and backward as one graph, without an optimizer.
"""

import copy
import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def build(shape: dict) -> LlamaForCausalLM:
  group = shape['heads'] // shape['kv']
  config = LlamaConfig(
    vocab_size=shape['vocab'], hidden_size=shape['hidden'], head_dim=shape['head_dim'],
    num_hidden_layers=shape['layers'], num_attention_heads=shape['heads'], num_key_value_heads=shape['kv'],
    intermediate_size=shape['ffn'], tie_word_embeddings=True, use_cache=False,
  )  # fmt: skip
  model = LlamaForCausalLM(config)
  for i, (kv, ffn) in enumerate(shape['widths']):
    own = copy.deepcopy(model.config)
    own.num_key_value_heads, own.num_attention_heads, own.intermediate_size = kv, kv * group, ffn
    model.model.layers[i] = LlamaDecoderLayer(own, i)
  return model


def main(text: str) -> None:
  shape = json.loads(text)
  torch.manual_seed(0)
  model = build(shape)
  tokens = torch.randint(0, shape['vocab'], (shape['micro'], shape['length']))
  compiled = torch.compile(model)

  def step() -> float:
    start = time.perf_counter()
    model.zero_grad()
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start

  cpu = time.process_time()
  first = step()
  cpu = time.process_time() - cpu
  print(json.dumps({'compile': first - step(), 'cpu': cpu}))


if __name__ == '__main__':
  main(*sys.argv[1:])
