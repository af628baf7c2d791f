"""Exports in the tools on top of transformers: Trainer, accelerate's device maps, shards.

transformers 4.57 runs `check_tools` in test_export_hf.py, in the one process that imports it.
"""

import pytest

from adapt_jax.models.formats.source import open_source
from tests.formats.test_export_hf import EXPORTS, check_logits, export, load
from tests.support.helpers import random_tokens
from tests.support.tokenizers_for_tests import tiny_tokenizer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')
pytestmark = pytest.mark.usefixtures('code_cache')


def check_tools(directory, out):
  check_device_map(directory, out / 'offloaded')
  check_shards(directory, out / 'shards')
  check_trainer(directory, out / 'trained')


def check_device_map(directory, out):
  """All on one device, and spread over memory and disk, layer by layer."""
  model = load(directory, device_map='auto')
  assert all(p.device.type == 'cpu' for p in model.parameters())
  check_logits(model, directory)
  model = load(directory, device_map='auto', max_memory={'cpu': 200_000}, offload_folder=str(out))
  places = set(model.hf_device_map.values())
  assert {str(place) for place in places} == {'cpu', 'disk'}, model.hf_device_map
  check_logits(model, directory)


def check_shards(directory, out):
  """Saved by transformers in several files."""
  load(directory).save_pretrained(out, max_shard_size='30KB')
  assert len(list(out.glob('*.safetensors'))) > 3
  check_logits(load(out), directory)
  assert open_source(str(out)).config == open_source(str(directory)).config


def check_trainer(directory, out):
  """Twelve steps of stock fine-tuning lower the loss; the checkpoint loads and is what was trained."""
  model = load(directory)
  rows = [{'input_ids': row, 'labels': row} for row in torch.tensor(random_tokens(model.config, rows=4))]
  arguments = transformers.TrainingArguments(
    output_dir=str(out),
    max_steps=12,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    logging_steps=1,
    save_steps=12,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
  )
  trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
  trainer.train()
  losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
  assert len(losses) == 12 and losses[-1] < 0.7 * losses[0], losses
  again, trained = load(out / 'checkpoint-12').state_dict(), model.state_dict()
  assert again.keys() == trained.keys() and all(torch.equal(again[name], trained[name]) for name in trained)
  assert open_source(str(out / 'checkpoint-12')).config == open_source(str(directory)).config


def test_tools_on_top_of_transformers(tmp_path):
  export(tmp_path / 'hf', EXPORTS['llama'], tokenizer=tiny_tokenizer())
  check_tools(tmp_path / 'hf', tmp_path)


def test_a_sliced_layer_stays_on_one_device(tmp_path):
  export(tmp_path / 'model', EXPORTS['llama-sliced'], tokenizer=tiny_tokenizer())
  small = {'cpu': 100_000}
  model = load(tmp_path / 'model', device_map='auto', max_memory=small, offload_folder=str(tmp_path / 'out'))
  assert {str(place) for place in model.hf_device_map.values()} == {'cpu', 'disk'}
  assert not [name for name in model.hf_device_map if 'shortcut' in name]
  check_logits(model, tmp_path / 'model')
