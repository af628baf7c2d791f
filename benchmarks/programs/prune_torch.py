"""Adapt-Pruner as a PyTorch user would write it: DIRECTORY STEPS OUT. For benchmarks/pruning.py.

Taylor scores by autograd, layer distances by hooks in the same forward pass, batches of 16 x 64 tokens,
gradients summed over them; after each step the weights are pruned. Paper sections 3.1 and 3.2, the authors'
settings (T = 50, A = 0.02, rho = 1). fp32.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROWS, LENGTH, BATCH = 128, 64, 16
STEPS, AMPLITUDE = 50, 0.02


def scores(model, tokens):
  """Layer distances [L], and for each layer the scores of its KV groups and MLP channels."""
  layers = model.model.layers
  cosines = torch.zeros(len(layers))
  hooks = []
  for i, layer in enumerate(layers):

    def hook(module, inputs, output, i=i):
      x, y = inputs[0].detach(), (output[0] if isinstance(output, tuple) else output).detach()
      cosines[i] += torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()

    hooks.append(layer.register_forward_hook(hook))
  for batch in tokens.split(BATCH):
    model(batch, labels=batch, use_cache=False).loss.backward()
  for hook in hooks:
    hook.remove()
  found = []
  with torch.no_grad():
    for layer in layers:
      a, m = layer.self_attn, layer.mlp
      rows = [
        (p.weight * p.weight.grad).abs().sum(1)
        for p in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj)
      ]
      columns = [(p.weight * p.weight.grad).abs().sum(0) for p in (a.o_proj, m.down_proj)]
      groups = rows[1].numel() // a.head_dim
      kv = sum(x.reshape(groups, -1).sum(1) for x in (rows[0], rows[1], rows[2], columns[0]))
      found.append((kv, rows[3] + rows[4] + columns[1]))
  model.zero_grad()
  return -cosines, found


def cut(linear, rows=None, columns=None):
  """Keeps only these rows or columns of a weight."""
  weight = linear.weight.data
  weight = weight[rows] if rows is not None else weight[:, columns]
  linear.weight = torch.nn.Parameter(weight.contiguous())
  linear.out_features, linear.in_features = weight.shape


def prune(model, found, sparsity, widths):
  for i, (layer, (kv, ffn)) in enumerate(zip(model.model.layers, found, strict=True)):
    a, m = layer.self_attn, layer.mlp
    share = sparsity[i].item()
    heads, channels = max(1, widths[0] - int(widths[0] * share)), max(1, int(widths[1] * (1 - share)))
    group = a.q_proj.weight.shape[0] // len(kv)
    if heads < len(kv):
      keep = kv.topk(heads).indices.sort().values
      own = (keep[:, None] * a.head_dim + torch.arange(a.head_dim)).flatten()
      queries = (keep[:, None] * group + torch.arange(group)).flatten()
      for linear, rows in ((a.q_proj, queries), (a.k_proj, own), (a.v_proj, own)):
        cut(linear, rows=rows)
      cut(a.o_proj, columns=queries)
    if channels < len(ffn):
      keep = ffn.topk(channels).indices.sort().values
      cut(m.gate_proj, rows=keep)
      cut(m.up_proj, rows=keep)
      cut(m.down_proj, columns=keep)


def main(directory: str, steps: str, out: str) -> None:
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
  tokens = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
  widths = model.config.num_key_value_heads, model.config.intermediate_size
  sparsity = torch.zeros(len(model.model.layers))
  for _ in range(int(steps)):
    distance, found = scores(model, tokens)
    scaled = 2 * (distance - distance.min()) / (distance.max() - distance.min()) - 1
    importance = (scaled - scaled.mean()) / (scaled - scaled.mean()).abs().max()
    sparsity += (1 / STEPS - AMPLITUDE * importance).clamp(min=0)
    prune(model, found, sparsity.clamp(max=0.95), widths)
  weights = {n: p.data.contiguous() for n, p in model.named_parameters()}
  pathlib.Path(out).mkdir(parents=True, exist_ok=True)
  save_file(weights, pathlib.Path(out) / 'model.safetensors')
  print(json.dumps({'parameters': sum(p.numel() for p in weights.values())}))


if __name__ == '__main__':
  main(*sys.argv[1:])
