"""The model card of an export: valid for the hub, complete for a run, silent on what is not known."""

import copy
import dataclasses

import huggingface_hub
import pytest

from adapt_jax.export.card import model_card
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.reports.origin import Origin

SHAPES = LayerShape(4, 2, 32), LayerShape(2, 1, 40)
CONFIG = ModelConfig('llama', 61, 32, 8, SHAPES, RopeConfig(1e4), 1e-5, True)
DENSE = CONFIG.with_layers((LayerShape(6, 3, 48),) * 2)
FILES = ('config.json', 'configuration_adapt.py', 'model.safetensors', 'modeling_adapt.py', 'mlx_adapt.py')
STAGE = {
  'stage': 1,
  'target': 11_000,
  'params': count_params(CONFIG),
  'perplexity_pruned': 12.345,
  'perplexity_recovered': 10.5,
  'tokens': 81_920,
  'num_heads': [4, 2],
  'num_kv_heads': [2, 1],
  'ffn': [32, 40],
}
REPORT = {
  'model': {
    'source': 'org/Base-1.5B',
    'hub': True,
    'license': {'license': 'other', 'license_name': 'base', 'license_link': 'LICENSE'},
    'params_before': count_params(DENSE),
    'params_after': count_params(CONFIG),
    'num_heads': [6, 6],
    'num_kv_heads': [3, 3],
    'ffn': [48, 48],
  },
  'perplexity': {'dense': 9.876, 'pruned': 12.345, 'recovered': 10.5, 'definition': 'exp of the mean loss'},
  'prune': {'method': 'obs', 'target': 0.8, 'amplitude': 0.02, 'calibration': {'samples': 8}},
  'data': {
    'calibration': ['calibration.txt'],
    'train': ['org/corpus:train'],
    'evaluate': ['heldout.txt'],
    'hub': ['org/corpus', 'org/pages', 'org/books'],
  },  # fmt: skip
  'texts': {
    'text': {'dense': 9.876, 'pruned': 12.345, 'recovered': 10.5, 'definition': 'exp of the mean loss'},
  },
  'tasks': {
    'dense': {'piqa': {'acc': 0.71, 'acc_norm': 0.72, 'version': 1.0, 'n': 1838}},
    'recovered': {'piqa': {'acc': 0.69}, 'lambada': {'perplexity': 20.0}},
  },
  'stages': [STAGE],
  'command': 'python main.py --config=configs/base.py --workdir=out',
  'versions': {'python': '3.11.7', 'jax': '0.10.2'},
}


def parsed(report, config=CONFIG, files=FILES):
  card = huggingface_hub.ModelCard(model_card(report, config, files))
  return card.data.to_dict(), card.text


def row(text, *cells):
  return '| ' + ' | '.join(cells) + ' |' in text


def test_a_run_tells_all():
  fields, text = parsed(REPORT)
  del fields['model-index']
  assert fields == {
    'base_model': 'org/Base-1.5B',
    'base_model_relation': 'finetune',
    'license': 'other',
    'license_name': 'base',
    'license_link': 'LICENSE',
    'datasets': ['org/corpus'],
    'library_name': 'transformers',
    'pipeline_tag': 'text-generation',
    'tags': ['adapt-jax', 'pruned', 'custom_code'],
  }
  assert f'{count_params(CONFIG):,} of {count_params(DENSE):,} parameters' in text
  for found in ('Pruned and retrained', '- Pruning: method `obs`, target `0.8`\n', '81,920 tokens',
                '- Calibration data: `calibration.txt`', '- Training data: `org/corpus:train`',
                'exp of the mean loss.', REPORT['command'], 'jax 0.10.2'):  # fmt: skip
    assert found in text, found
  assert row(text, '0', '2 of 3', '32 of 48') and row(text, '1', '1 of 3', '40 of 48')
  assert row(text, 'dense', '9.88') and row(text, 'pruned', '12.35') and row(text, 'recovered', '10.50')
  assert row(text, 'piqa', 'acc', '0.7100', '0.6900') and row(text, 'piqa', 'acc_norm', '0.7200', '')
  assert row(text, 'lambada', 'perplexity', '', '20.0000')
  assert "AutoModelForCausalLM.from_pretrained('DIRECTORY', trust_remote_code=True" in text
  assert 'vllm serve DIRECTORY --trust-remote-code' in text
  assert 'mlx_lm.generate --model DIRECTORY --trust-remote-code' in text and 'llama' not in text


def test_results_are_in_the_schema_of_the_hub(tmp_path):
  """As huggingface_hub itself reads them from a file."""
  report = copy.deepcopy(REPORT)
  report['data']['evaluate'] = ['web=org/pages:en:validation', 'books=org/books', 'heldout.txt', 'a/more.txt']
  report['texts'] = {
    'web': {'dense': 9.0, 'pruned': 12.0, 'recovered': 10.5},
    'books': {'dense': 5.0, 'pruned': 6.5},
    'text': {'dense': 4.0},
  }
  (tmp_path / 'README.md').write_text(model_card(report, CONFIG, FILES, 'me/small'))
  data = huggingface_hub.ModelCard.load(tmp_path / 'README.md').data
  found = [
    (r.dataset_type, r.dataset_name, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
    for r in data.eval_results
  ]
  assert data.model_name == 'small' and {r.task_type for r in data.eval_results} == {'text-generation'}
  assert found == [
    ('org/pages', 'web', 'en', 'validation', 'perplexity', 10.5),
    ('org/books', 'books', None, 'train', 'perplexity', 6.5),
    ('piqa', 'piqa', None, None, 'acc', 0.69),
    ('lambada', 'lambada', None, None, 'perplexity', 20.0),
  ]
  report['texts']['text']['recovered'] = 4.5
  *_, last = [
    r for r in parsed_results(report, FILES) if r.metric_type == 'perplexity' and r.dataset_type != 'lambada'
  ]
  assert last.dataset_type == last.dataset_name == 'heldout.txt, more.txt' and last.metric_value == 4.5


def test_texts_in_directories_of_one_name_are_two_results():
  report = copy.deepcopy(REPORT)
  report['data']['evaluate'] = ['addresses=data/a/valid', 'encyclopedia=data/b/valid']
  report['texts'] = {'addresses': {'recovered': 10.5}, 'encyclopedia': {'recovered': 12.0}}
  found = [(r.dataset_name, r.metric_value) for r in parsed_results(report, FILES)]
  assert found[:2] == [('addresses', 10.5), ('encyclopedia', 12.0)]


def parsed_results(report, files):
  return huggingface_hub.ModelCard(model_card(report, CONFIG, files)).data.eval_results


def test_results_are_not_those_of_quantised_files():
  sentence = 'before they were quantised'
  for files, quantised, others in ((('model-Q8_0.gguf',), True, False), (('model-F16.gguf',), False, True),
                                   (('model-Q4_0.gguf', 'model-BF16.gguf'), True, True)):  # fmt: skip
    assert bool(parsed_results(REPORT, files)) == others
    assert (sentence in model_card(REPORT, CONFIG, files)) == quantised
  unpruned = {'model': {'source': 'org/Base', 'hub': True}}
  assert parsed(unpruned, files=('model-Q8_0.gguf',))[0]['base_model_relation'] == 'quantized'
  assert 'base_model_relation' not in parsed(unpruned)[0]
  saved = {
    'model': {'source': 'org/Base', 'hub': True, 'params_before': 10**12}
  }  # pruned in the library: without stages
  fields = parsed(saved, files=('model-Q8_0.gguf',))[0]
  assert fields['base_model_relation'] == 'finetune' and 'pruned' in fields['tags']


def test_a_repository_is_named_where_the_model_is_loaded():
  card = model_card(REPORT, CONFIG, FILES, 'me/small')
  assert "from_pretrained('me/small'" in card and 'vllm serve me/small ' in card and 'DIRECTORY' not in card
  card = model_card(REPORT, CONFIG, ('model-Q8_0.gguf',), 'me/small-GGUF')
  assert "`llama-cli -hf me/small-GGUF:Q8_0 -p 'Hello'`" in card


def test_a_bare_checkpoint_invents_nothing():
  config = CONFIG.with_layers(SHAPES[:1])
  fields, text = parsed({'model': {'source': 'org/Base'}}, config, ('config.json', 'model.safetensors'))
  assert fields['tags'] == ['adapt-jax'] and 'license' not in fields
  assert text.count('\n## ') == 2 and '## Lineage' in text and '## Load it' in text
  for unknown in ('None', 'runed', ' retrained', 'erplexity', 'trust', 'data', 'Python files'):
    assert unknown not in text


def test_pruning_alone_is_not_called_training():
  report = copy.deepcopy(REPORT)
  report['stages'][0] |= {'tokens': 0, 'perplexity_recovered': None}
  report['perplexity'] |= {'recovered': None}
  del report['data']['train']
  text = parsed(report)[1]
  assert 'Pruned by' in text and 'Training' not in text and 'Recovery' not in text and 'None' not in text
  report['perplexity'] = dict.fromkeys(report['perplexity'])  # no evaluation at all
  assert '## Perplexity' not in parsed(report)[1]


def test_parts_that_are_none_are_left_out():
  report = copy.deepcopy(REPORT) | dict.fromkeys(('perplexity', 'tasks', 'prune', 'train', 'data'))
  text = model_card(report, CONFIG, FILES)
  assert '## Perplexity' not in text and '## Tasks' not in text and '## Widths' in text


@pytest.mark.parametrize(
  ('config', 'title'),
  [
    (dict(vocab_size=50), 'its vocabulary trimmed'),
    (dict(hidden_size=24), 'narrowed to'),
    (dict(vocab_size=50, hidden_size=24), 'narrowed to'),
  ],
)
@pytest.mark.parametrize('pruned', [False, True])
def test_what_several_runs_removed_is_told_by_the_first_sizes(config, title, pruned):
  """Also where the last run only trimmed or narrowed a pruned model."""
  result = dataclasses.replace(CONFIG if pruned else DENSE, **config)
  text = parsed(Origin('org/Base-1.5B', hub=True).sized(DENSE).report(), result)[1]
  assert f'# org/Base-1.5B, {"pruned to" if pruned else title}' in text
  assert (f'trimmed to {result.vocab_size} of 61 tokens' in text) == ('vocab_size' in config)
  assert (f'reduced from 32 to {result.hidden_size},' in text) == ('hidden_size' in config)


def test_layers_that_are_gone_stay_where_they_were():
  report = copy.deepcopy(REPORT)
  report['stages'][0] |= {'num_kv_heads': [0, 3], 'ffn': [0, 48]}
  text = parsed(report, DENSE.with_layers(DENSE.layers[:1]))[1]
  assert row(text, '0', '0 of 3', '0 of 48') and row(text, '1', '3 of 3', '48 of 48')


@pytest.mark.parametrize('name', ['~/models/base', 'models/base.gguf', 'C: #"odd"', 'base'])
def test_a_local_base_model_is_named_without_its_path(name):
  """The hub would take it for an id."""
  report = copy.deepcopy(REPORT)
  report['model'] |= {'source': name, 'hub': False}
  fields, text = parsed(report)
  assert 'base_model' not in fields and 'models/' not in text
  assert f'# {name.split("/")[-1]}, pruned' in text


def test_gguf_files_are_loaded_by_llama_cpp():
  fields, text = parsed(REPORT, files=('model-q8_0.gguf', 'README.md'))
  assert fields['tags'] == ['adapt-jax', 'pruned', 'gguf'] and 'library_name' not in fields
  assert 'llama-cli -m model-q8_0.gguf' in text and 'transformers' not in text and 'vllm' not in text


@pytest.mark.parametrize('hub', [True, False])
def test_what_is_of_the_hub_was_decided_when_it_was_opened(tmp_path, monkeypatch, hub):
  """A model and a text that were read as org/name from a directory, and the reverse."""
  report = copy.deepcopy(REPORT)
  report['model']['hub'] = hub
  report['data']['hub'] = ['org/corpus'] if hub else []
  for path in ('org/Base-1.5B', 'org/corpus:train') if hub else ():
    (tmp_path / path).mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  fields, _ = parsed(report)
  assert fields.get('base_model') == ('org/Base-1.5B' if hub else None)
  assert fields.get('datasets') == (['org/corpus'] if hub else None)


def test_a_model_pruned_twice_names_the_first(tmp_path):
  report = copy.deepcopy(REPORT)
  first = Origin('org/Base-1.5B', hub=True, params=2 * count_params(DENSE))
  report['origin'] = dataclasses.asdict(first)
  report['model'] |= {'source': str(tmp_path / 'pruned'), 'hub': False}
  fields, text = parsed(report)
  share = count_params(CONFIG) / count_params(DENSE) / 2
  assert fields['base_model'] == 'org/Base-1.5B' and f'# org/Base-1.5B, pruned to {share:.1%}' in text
  assert (
    '- Pruned from: `pruned`, an export of adapt-jax; it is the dense model below' in text
    and str(tmp_path) not in text
  )


@pytest.mark.parametrize(
  ('family', 'heads', 'files', 'runs'),
  [
    ('llama', 4, ('model.safetensors',), True),
    ('granite', 4, ('model.safetensors',), False),
    ('mistral', 4, ('model.safetensors',), True),
    ('qwen2', 4, ('model.safetensors',), True),
    ('qwen2', 2, ('model.safetensors',), False),  # its attention is half as wide as the stream
    ('qwen2', 2, ('model.safetensors', 'mlx_adapt.py'), True),
  ],
)
def test_mlx_lm_is_named_where_it_runs_the_model(family, heads, files, runs):
  shapes = (LayerShape(heads, heads // 2, 32),) * 2
  config = ModelConfig(family, 61, 32, 8, shapes, RopeConfig(1e4), 1e-5, True, qkv_bias=family == 'qwen2')
  assert ('mlx_lm.generate' in model_card(REPORT | {'stages': []}, config, files)) == runs
  windows = config.with_layers(tuple(dataclasses.replace(shape, window=16) for shape in config.layers))
  assert 'mlx_lm.generate' not in model_card(REPORT | {'stages': []}, windows, files)


def test_whole_layers_are_called_so():
  report = copy.deepcopy(REPORT)
  report['stages'][0] |= {'num_kv_heads': [0, 3], 'ffn': [0, 48]}
  text = parsed(report, DENSE.with_layers(DENSE.layers[:1]))[1]
  assert 'parameters: whole layers were removed. Pruned and retrained by' in text
  del report['stages']  # as of the library, which does not know
  assert 'KV-head groups and MLP channels were removed' in parsed(report)[1]
