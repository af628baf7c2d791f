"""The model card of an export: valid for the hub, complete for a run, silent on what is not known."""

import copy
import dataclasses

import huggingface_hub
import markdown_it
import pytest

from adapt_jax.export.card import model_card
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.reports.origin import Origin

SHAPES = LayerShape(4, 2, 32), LayerShape(2, 1, 40)
CONFIG = ModelConfig('llama', 61, 32, 8, SHAPES, RopeConfig(1e4), 1e-5, True)
DENSE = CONFIG.with_layers((LayerShape(6, 3, 48),) * 2)
FILES = ('config.json', 'configuration_adapt.py', 'model.safetensors', 'modeling_adapt.py', 'mlx_adapt.py')
REPORT = {
  'model': {
    'source': 'org/Base-1.5B', 'hub': True, 'params_before': count_params(DENSE),
    'license': {'license': 'other', 'license_name': 'base', 'license_link': 'LICENSE'},
    'num_heads': [6, 6], 'num_kv_heads': [3, 3], 'ffn': [48, 48],
  },
  'perplexity': {'dense': 9.876, 'pruned': 12.345, 'recovered': 10.5, 'definition': 'exp of the mean loss'},
  'prune': {'method': 'obs', 'target': 0.8, 'amplitude': 0.02, 'calibration': {'samples': 8}},
  'data': {
    'calibration': ['calibration.txt'], 'train': ['org/corpus:train'], 'evaluate': ['heldout.txt'],
    'hub': ['org/corpus', 'org/pages', 'org/books'],
  },
  'texts': {'text': {'dense': 9.876, 'pruned': 12.345, 'recovered': 10.5}},
  'tasks': {
    'dense': {'piqa': {'acc': 0.71, 'acc_norm': 0.72, 'version': 1.0, 'n': 1838}},
    'recovered': {'piqa': {'acc': 0.69}, 'lambada': {'perplexity': 20.0}},
  },
  'stages': [{
    'stage': 1, 'params': count_params(CONFIG), 'perplexity_pruned': 12.345, 'perplexity_recovered': 10.5,
    'tokens': 81_920, 'num_heads': [4, 2], 'num_kv_heads': [2, 1], 'ffn': [32, 40],
  }],
  'command': 'python main.py --config=configs/base.py --workdir=out',
  'versions': {'python': '3.11.7', 'jax': '0.10.2'},
}  # fmt: skip


def parsed(report, config=CONFIG, files=FILES, repo=''):
  card = huggingface_hub.ModelCard(model_card(report, config, files, repo))
  return card.data, card.text


def row(text, *cells):
  return '| ' + ' | '.join(cells) + ' |' in text


def changed(**fields):
  return copy.deepcopy(REPORT) | fields


def test_a_run_tells_all():
  data, text = parsed(REPORT)
  fields = data.to_dict()
  del fields['model-index']
  assert fields == {
    'base_model': 'org/Base-1.5B', 'base_model_relation': 'finetune',
    'license': 'other', 'license_name': 'base', 'license_link': 'LICENSE',
    'datasets': ['org/corpus'], 'library_name': 'transformers', 'pipeline_tag': 'text-generation',
    'tags': ['adapt-jax', 'pruned', 'custom_code'],
  }  # fmt: skip
  for found in (f'{count_params(CONFIG):,} of {count_params(DENSE):,} parameters', 'Pruned and retrained',
                '- Pruning: method `obs`, target `0.8`\n', '81,920 tokens', '`calibration.txt`',
                '- Training data: `org/corpus:train`', 'exp of the mean loss.', REPORT['command'],
                'jax 0.10.2'):  # fmt: skip
    assert found in text, found
  assert row(text, '1', f'{count_params(CONFIG):,}', '12.35', '10.50', '81,920')
  assert row(text, '0', '2 of 3', '32 of 48') and row(text, '1', '1 of 3', '40 of 48')
  assert row(text, 'text', '9.88', '12.35', '10.50', '0.061', '–')
  assert row(text, 'piqa', 'acc', '0.7100', '0.6900') and row(text, 'piqa', 'acc_norm', '0.7200', '')
  assert "AutoModelForCausalLM.from_pretrained('DIRECTORY', trust_remote_code=True" in text
  assert 'vllm serve DIRECTORY --trust-remote-code' in text
  assert "AutoTokenizer.from_pretrained('DIRECTORY')" in text
  assert 'mlx_lm.generate --model DIRECTORY --trust-remote-code' in text and 'llama' not in text


def test_results_are_in_the_schema_of_the_hub():
  """As huggingface_hub itself reads them. Directories of one name are told apart by their texts' names."""
  entries = ['web=org/pages:en:validation', 'books=org/books', 'a=data/a/valid', 'c.txt']
  report = changed(data=REPORT['data'] | {'evaluate': entries})
  report['texts'] = {'web': {'dense': 9.0, 'pruned': 12.0, 'recovered': 10.5}, 'books': {'pruned': 6.5}}
  report['texts'] |= {'a': {'recovered': 1.5}, 'text': {'recovered': 4.5}}
  data = parsed(report, repo='me/small')[0]
  assert data.model_name == 'small' and {r.task_type for r in data.eval_results} == {'text-generation'}
  assert [
    (r.dataset_type, r.dataset_name, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value)
    for r in data.eval_results
  ] == [
    ('org/pages', 'web', 'en', 'validation', 'perplexity', 10.5),
    ('org/books', 'books', None, 'train', 'perplexity', 6.5),
    ('a', 'a', None, None, 'perplexity', 1.5),
    ('c.txt', 'c.txt', None, None, 'perplexity', 4.5),
    ('piqa', 'piqa', None, None, 'acc', 0.69),
    ('lambada', 'lambada', None, None, 'perplexity', 20.0),
  ]


@pytest.mark.parametrize('types, results', [(['Q8_0'], False), (['F16'], True), (['Q4_0', 'BF16'], True)])
def test_results_are_not_those_of_quantised_files(types, results):
  data, text = parsed(REPORT, files=[f'model-{name}.gguf' for name in types])
  assert bool(data.eval_results) == results and ('before they were quantised' in text) == (types != ['F16'])


def test_how_the_model_relates_to_its_base():
  unpruned = {'model': {'source': 'org/Base', 'hub': True}}
  assert parsed(unpruned, files=('model-Q8_0.gguf',))[0].base_model_relation == 'quantized'
  assert 'base_model_relation' not in parsed(unpruned)[0].to_dict()
  unpruned['model']['params_before'] = 10**12  # pruned in the library: without stages
  saved = parsed(unpruned, files=('model-Q8_0.gguf',))[0]
  assert saved.base_model_relation == 'finetune' and 'pruned' in saved.tags


def test_a_repository_is_named_where_the_model_is_loaded():
  card = parsed(REPORT, repo='me/small')[1]
  assert "from_pretrained('me/small'" in card and 'vllm serve me/small ' in card and 'DIRECTORY' not in card
  data, card = parsed(REPORT, files=('model-Q8_0.gguf', 'README.md'), repo='me/small-GGUF')
  assert data.tags == ['adapt-jax', 'pruned', 'gguf'] and data.library_name is None
  assert "`llama-cli -hf me/small-GGUF:Q8_0 -p 'Hello'`" in card and 'vllm' not in card


def test_a_bare_checkpoint_invents_nothing():
  config = CONFIG.with_layers(SHAPES[:1])
  data, text = parsed({'model': {'source': 'org/Base'}}, config, ('config.json', 'model.safetensors'))
  assert data.tags == ['adapt-jax'] and data.license is None
  assert text.count('\n## ') == 2 and '## Lineage' in text and '## Load it' in text
  for unknown in ('None', 'runed', ' retrained', 'erplexity', 'trust', 'data', 'Python files'):
    assert unknown not in text


def test_pruning_alone_is_not_called_training_and_layers_that_are_gone_stay_where_they_were():
  report = changed()
  report['stages'][0] |= {'tokens': 0, 'perplexity_recovered': None, 'num_kv_heads': [0, 3], 'ffn': [0, 48]}
  report['perplexity'] |= {'recovered': None}
  del report['data']['train']
  text = parsed(report, DENSE.with_layers(DENSE.layers[:1]))[1]
  assert 'Pruned by' in text and 'Training' not in text and 'Recovery' not in text and 'None' not in text
  assert row(text, '0', '0 of 3', '0 of 48') and row(text, '1', '3 of 3', '48 of 48')


@pytest.mark.parametrize(
  'before, sizes, kind, told',
  [
    (DENSE, {'vocab_size': 50}, 'trimmed', 'trimmed to 50 of 61 tokens'),
    (DENSE, {'hidden_size': 24}, 'narrowed', 'reduced from 32 to 24,'),
    (CONFIG, {'vocab_size': 50}, 'pruned', 'trimmed to 50 of 61 tokens'),
  ],
)
def test_what_several_runs_removed_is_told_by_the_first_sizes(before, sizes, kind, told):
  origin = Origin('org/Base-1.5B', hub=True).sized(DENSE).report()
  text = parsed(origin, dataclasses.replace(before, **sizes))[1]
  assert f'# org/Base-1.5B, {kind} to' in text and told in text
  assert ('whole layers were removed' in text) == (before is CONFIG)


def test_a_local_model_is_named_without_its_path_and_one_pruned_twice_names_the_first():
  origin = dataclasses.asdict(Origin('org/Base-1.5B', hub=True, params=2 * count_params(DENSE)))
  model = REPORT['model'] | {'source': '/data/pruned', 'hub': False}
  data, text = parsed(changed(model=model))  # the hub would take it for an id
  assert data.base_model is None and '/data' not in text and '# pruned, pruned to' in text
  data, text = parsed(changed(model=model, origin=origin))
  share = count_params(CONFIG) / count_params(DENSE) / 2
  assert data.base_model == 'org/Base-1.5B' and f'# org/Base-1.5B, pruned to {share:.1%}' in text
  assert '- Pruned from: `pruned`, an export of adapt-jax' in text


def test_names_mean_nothing_in_markdown_and_html():
  """Names of models, tasks and texts come from others, and the hub shows cards as pages."""
  odd = '<b>`*x*`|[a](b)\n# y</b>'
  report = changed(model=REPORT['model'] | {'source': odd, 'hub': False}, command=f'main.py {odd}\n```\n# z')
  report['tasks'] = {'dense': {odd: {odd: 0.5}}}
  report['texts'] = {odd: {'dense': 1.0, 'recovered': 2.0}, 'b': {'dense': 1.0, 'recovered': 2.0}}
  report['prune'], report['data']['evaluate'] = {'method': odd}, [odd]
  tokens = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table').parse(parsed(report)[1])
  flat = [t for token in tokens for t in (token, *(token.children or ()))]
  assert not {'html_inline', 'html_block', 'em_open', 'link_open'} & {t.type for t in flat}
  titles = [after.content for t, after in zip(flat, flat[1:], strict=False) if t.type == 'heading_open']
  assert titles[1:] == ['Loss', 'Tasks', 'Lineage', 'Widths', 'Load it', 'Made by']


@pytest.mark.parametrize(
  'family, heads, more, runs',
  [
    ('llama', 4, [], True),
    ('granite', 4, [], False),
    ('qwen2', 2, [], False),  # its attention is half as wide as the stream
    ('qwen2', 2, ['mlx_adapt.py'], True),
  ],
)
def test_mlx_lm_is_named_where_it_runs_the_model(family, heads, more, runs):
  shapes, files = (LayerShape(heads, heads // 2, 32),) * 2, ['model.safetensors', *more]
  config = ModelConfig(family, 61, 32, 8, shapes, RopeConfig(1e4), 1e-5, True, qkv_bias=family == 'qwen2')
  assert ('mlx_lm.generate' in parsed(changed(stages=[]), config, files)[1]) == runs
  windows = config.with_layers(tuple(dataclasses.replace(shape, window=16) for shape in config.layers))
  assert 'mlx_lm.generate' not in parsed(changed(stages=[]), windows, files)[1]
