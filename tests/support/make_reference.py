"""Writes the files of tests/data from what the authors' program computed: see the README there.

    python -m tests.support.make_reference GOLDEN WIKITEXT

GOLDEN is the directory that benchmarks/reference_parity.py reads, WIKITEXT the validation text of WikiText-2.
"""

import json
import pathlib
import sys

import numpy as np

from adapt_jax.models.formats.source import open_source
from benchmarks.reference_parity import MODEL
from tests.support.reference import FIGURES, STEPS, WINDOWS

AROUND = 16  # characters of the text before and after a window


def write_windows(golden: pathlib.Path, text: str) -> None:
  """Token ids of all windows, and of each the text from which it was made."""
  tokens, tokenizer = np.load(golden / 'calib.npy'), open_source(str(MODEL)).load_tokenizer()
  excerpts = []
  for row in tokens:
    inside = tokenizer.decode(row).strip('\ufffd')
    at = text.index(inside)
    excerpts.append(text[max(0, at - AROUND) : at + len(inside) + AROUND])
  joined = np.frombuffer('\0'.join(excerpts).encode(), np.uint8)
  np.savez_compressed(WINDOWS, tokens=tokens.astype(np.uint16), texts=joined)


def write_figures(golden: pathlib.Path) -> None:
  """Scores of the first step, and of the first steps widths, sparsities and some masks."""
  first, run = np.load(golden / 'step1_n128.npz'), golden / 'reference_n128'
  steps = json.loads((run / 'steps.json').read_text())[:STEPS]
  figures = {name: first[name] for name in ('cosine_mean', 'normalized_importance', 'batch_losses')}
  figures['ffn_scores'] = first['mlp_channel_importance']
  # Of the rows (columns of o) of query heads and of KV heads the sums by KV group.
  figures['kv_scores'] = sum(first[f'taylor_{name}_proj'].reshape(30, 3, -1).sum(-1) for name in 'qkvo')
  for name, of in (('params', 'params'), ('kv', 'num_kv_heads'), ('ffn', 'ffn'), ('sparsity', 'sparsity')):
    figures[name] = np.array([step[of] for step in steps])
  for path in sorted(run.glob('kept_step*.npz')):
    if (step := int(path.stem[-2:])) <= STEPS:
      for name, mask in np.load(path).items():
        figures[f'kept_{name}_{step}'] = np.packbits(mask)
  small = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in figures.items()}
  np.savez_compressed(FIGURES, **small)


if __name__ == '__main__':
  write_windows(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_text())
  write_figures(pathlib.Path(sys.argv[1]))
