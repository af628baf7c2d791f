"""Compares mode export with a plain copy, for an unchanged checkpoint with LLaMA-3.1-8B's shapes.

    python -m benchmarks.export [--layers=4] [--rounds=3] [--write]

The checkpoint is synthetic: random bf16 weights in shards of up to 5 GB and a tokenizer of a few words.
--layers sets the number of decoder layers (3.9 GB with 4, 16 GB with 32). In turn, each in a new process:

- copy: `cp -r`, then `sync` of the files.
- ours: `main.py --mode=export` with export.formats=hf, which reads, writes, syncs, reads back and compares.
  Its parts are timed, and its anonymous memory is sampled. Mapped files are part of the system's
  page cache, which it frees when needed: they count only in the peak resident memory (in brackets).
- transformers: from_pretrained in the stored dtype, save_pretrained, the same sync.

A whole command also starts Python and imports JAX, transformers and, if it is installed, PyTorch.

Before each, the checkpoint's files are read (a warm page cache, as far as memory allows); the output is
deleted afterwards. Limits are also measured: a copy in memory by one thread, and a write of as many bytes
with a sync. The disk needs twice the checkpoint's size. A round of 4 layers takes half a minute on two cores.
With 32 layers, source and copy exceed 24 GB of memory: then the disk limits the speed of all.
"""

import dataclasses
import json
import math
import pathlib
import random
import shutil
import statistics
import struct
import sys
import tempfile
import time

from benchmarks.side_by_side import ROOT, Run, parser, ratio, report, run, spread

PARTS = ('read', 'write', 'check')
PROGRAMS = ROOT / 'benchmarks/programs'
_BLOCK = 1 << 22  # random bytes, which tensors repeat, each from another offset
WORDS = ('<unk>', '</s>', *['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog', '.', ','])


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of a Llama without tied embeddings; `shard_bytes` is the largest size of a file."""

  hidden: int = 4096
  heads: int = 32
  kv_heads: int = 8
  ffn: int = 14336
  vocab: int = 128256
  shard_bytes: int = 5_000_000_000

  def tensors(self, layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the files."""
    narrow = self.hidden // self.heads * self.kv_heads
    layer = {
      'input_layernorm': (self.hidden,),
      'self_attn.q_proj': (self.hidden, self.hidden),
      'self_attn.k_proj': (narrow, self.hidden),
      'self_attn.v_proj': (narrow, self.hidden),
      'self_attn.o_proj': (self.hidden, self.hidden),
      'post_attention_layernorm': (self.hidden,),
      'mlp.gate_proj': (self.ffn, self.hidden),
      'mlp.up_proj': (self.ffn, self.hidden),
      'mlp.down_proj': (self.hidden, self.ffn),
    }
    table = (self.vocab, self.hidden)
    found: dict[str, tuple[int, ...]] = {'model.embed_tokens': table}
    found |= {f'model.layers.{i}.{name}': shape for i in range(layers) for name, shape in layer.items()}
    found |= {'model.norm': (self.hidden,), 'lm_head': table}
    return {f'{name}.weight': shape for name, shape in found.items()}

  def config(self, layers: int) -> dict[str, object]:
    """The contents of config.json."""
    scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'rope_type': 'llama3'}
    return {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'hidden_size': self.hidden,
      'num_hidden_layers': layers,
      'num_attention_heads': self.heads,
      'num_key_value_heads': self.kv_heads,
      'intermediate_size': self.ffn,
      'vocab_size': self.vocab,
      'max_position_embeddings': 131072,
      'rope_theta': 500000.0,
      'rope_scaling': scaling | {'original_max_position_embeddings': 8192},
      'rms_norm_eps': 1e-5,
      'hidden_act': 'silu',
      'tie_word_embeddings': False,
      'torch_dtype': 'bfloat16',
    }


SHAPES = {'llama-3.1-8b': Shape(), 'toy': Shape(64, 4, 2, 96, 256, 100_000)}


def write_checkpoint(directory: pathlib.Path, shape: Shape, layers: int) -> dict[str, int]:
  """Writes a Hugging Face directory piece by piece; returns the bytes of each tensor."""
  directory.mkdir(parents=True)
  tensors = shape.tensors(layers)
  sizes = {name: 2 * math.prod(found) for name, found in tensors.items()}
  shards: list[list[str]] = [[]]
  for name, size in sizes.items():
    if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shape.shard_bytes:
      shards.append([])
    shards[-1].append(name)
  block = _random_block()
  weight_map = {}
  for k, names in enumerate(shards):
    file = f'model-{k + 1:05d}-of-{len(shards):05d}.safetensors'
    weight_map |= dict.fromkeys(names, file)
    _write_shard(directory / file, {name: tensors[name] for name in names}, sizes, block)
  index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
  vocab = {word: i for i, word in enumerate(WORDS)}
  tokenizer = {
    'version': '1.0',
    'added_tokens': [],
    'pre_tokenizer': {'type': 'Whitespace'},
    'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': WORDS[0]},
  }
  names = {'tokenizer_class': 'PreTrainedTokenizerFast', 'unk_token': WORDS[0], 'eos_token': WORDS[1]}
  documents = {
    'model.safetensors.index.json': index,
    'config.json': shape.config(layers),
    'tokenizer.json': tokenizer,
    'tokenizer_config.json': names,
  }
  for file, content in documents.items():
    (directory / file).write_text(json.dumps(content), encoding='utf-8')
  return sizes


def _random_block() -> bytes:
  """bf16 numbers of about 0.01 with either sign: their upper bytes are 0x3C or 0xBC."""
  block = bytearray(random.Random(0).randbytes(_BLOCK))
  block[1::2] = block[1::2].translate(bytes(0xBC if byte % 2 else 0x3C for byte in range(256)))
  return bytes(block)


def _write_shard(
  path: pathlib.Path, tensors: dict[str, tuple[int, ...]], sizes: dict[str, int], block: bytes
) -> None:
  header, end = {}, 0
  for name, shape in tensors.items():
    start, end = end, end + sizes[name]
    header[name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': (start, end)}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for k, name in enumerate(tensors):
      left, at = sizes[name], 4096 * k % len(block)
      while left:
        left -= file.write(block[at : at + left])
        at = 0


def read_through(directory: pathlib.Path) -> None:
  """Brings the files into the page cache."""
  buffer = bytearray(1 << 20)
  for path in directory.iterdir():
    with open(path, 'rb', buffering=0) as file:
      while file.readinto(buffer):
        pass


def commands(source: pathlib.Path, out: pathlib.Path) -> dict[str, list[str]]:
  return {
    'ours': [sys.executable, str(PROGRAMS / 'export_ours.py'), str(source), str(out)],
    'copy': ['sh', '-c', 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)],
    'transformers': [sys.executable, str(PROGRAMS / 'export_transformers.py'), str(source), str(out)],
  }


def measure(source: pathlib.Path, out: pathlib.Path, rounds: int) -> dict[str, list[Run]]:
  """Runs each program once per round, with the same state of the page cache, and deletes its output.

  A virtual machine gradually returns freed memory to its host, and getting it back takes longer than a copy.
  So the delay between the deletion and the start of `cp` is that before ours starts to write.
  """
  runs: dict[str, list[Run]] = {name: [] for name in commands(source, out)}
  for i in range(rounds):
    starts = 0.0
    for name, command in commands(source, out).items():
      read_through(source)
      time.sleep(starts if name == 'copy' else 0)
      runs[name].append(found := run(command))
      shutil.rmtree(out)
      if name == 'ours':
        starts = max(0.0, found.seconds - sum(found.answer[part][0] for part in PARTS))
      print(
        f'round {i + 1}/{rounds} {name}: {found.seconds:.1f} s, {found.cpu_seconds:.1f} CPU s '
        f'{json.dumps(found.answer)}',
        file=sys.stderr,
        flush=True,
      )
  return runs


def limits(directory: pathlib.Path, size: int) -> dict[str, float]:
  """GB/s of a copy in memory and of a write of `size` bytes with a sync."""
  return run([sys.executable, str(PROGRAMS / 'export_limits.py'), str(directory / 'limit'), str(size)]).answer


def table(runs: dict[str, list[Run]], limit: dict[str, float], sizes: dict[str, int]) -> str:
  total, largest = sum(sizes.values()), max(sizes.values())
  ours, theirs = ([r.answer for r in runs[name]] for name in ('ours', 'transformers'))
  copy = [r.seconds for r in runs['copy']]

  def row(what: str, times: list[tuple[float, float]], memory: str = '') -> str:
    seconds, cpu = map(list, zip(*times, strict=True))
    rate = spread([total / s / 1e9 for s in seconds])
    return f'| {what} | {spread(seconds)} | {rate} | {ratio(seconds, copy)} | {spread(cpu)} | {memory} |'

  def whole(name: str) -> list[tuple[float, float]]:
    return [(r.seconds, r.cpu_seconds) for r in runs[name]]

  def memory(name: str) -> str:
    above = [r.answer['anonymous_bytes'] / largest for r in runs[name]]
    resident = statistics.median(r.peak_bytes / 1e9 for r in runs[name])
    return f'{spread(above, 3)} ({resident:.1f} GB)'

  moved = [[x + y for x, y in zip(a['read'], a['write'], strict=True)] for a in ours]
  rows = (
    row('`cp` and `sync`', whole('copy')),
    row('ours: read and write, sync', moved, memory('ours')),
    row('ours: read back, compare bits', [a['check'] for a in ours]),
    row('ours: whole command', whole('ours')),
    row('transformers: read and write, sync', [a['moved'] for a in theirs], memory('transformers')),
    row('transformers: whole program', whole('transformers')),
  )
  lines = '\n'.join(rows)
  return f"""{total / 1e9:.2f} GB of bf16 weights, the largest {largest / 1e9:.2f} GB; page cache warm, files
synced by all. Memory: peak of anonymous memory beyond what the program had before it read, in units of the
largest tensor: both map the files and hold no model (in brackets: resident peak, what is mapped included).

| | seconds | GB/s | times the copy | CPU seconds | memory |
|---|---|---|---|---|---|
{lines}

Limits: {limit['memory']:.2f} GB/s of a copy in memory, {limit['disk']:.2f} GB/s of a write of as many bytes
with a sync.
"""


def main() -> None:
  arguments = parser(__doc__, rounds=3)
  arguments.add_argument('--layers', type=int, default=4, help='decoder layers; the model has 32')
  arguments.add_argument('--shape', choices=SHAPES, default='llama-3.1-8b')
  arguments.add_argument('--directory', type=pathlib.Path, default=ROOT / 'out', help='where files are made')
  args = arguments.parse_args()
  args.directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
    directory = pathlib.Path(scratch)
    sizes = write_checkpoint(directory / 'source', SHAPES[args.shape], args.layers)
    limit = limits(directory, sum(sizes.values()))
    runs = measure(directory / 'source', directory / 'out', args.rounds)
  report('Export: a checkpoint in and out', table(runs, limit, sizes), args.write)


if __name__ == '__main__':
  main()
