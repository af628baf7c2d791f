"""Tokenizers in exported .gguf files: the same ids in the real llama.cpp and in our own reader."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adapt_jax.export.gguf import write_gguf
from adapt_jax.export.gguf_vocab import check_gguf_tokenizer
from adapt_jax.models.formats.gguf_header import open_file
from adapt_jax.models.formats.gguf_tokenizer import load_tokenizer
from tests.formats.test_gguf_model import MERGES, PIECES, SPECIALS, TEXTS, byte_level, sentence_piece
from tests.support.helpers import UNIFORM, random_params, refused, tiny_config
from tests.support.llama_cpp import Job, ask, needs_llama_cpp

# As in the tokenizer.json of Llama 3 and Qwen2.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
COMPOSED = (
  *TEXTS[:2],
  "It's déjà vu: 你好, мир, ½ ٣ 🙂👩‍👩‍👧 'RE unmerged",
  '<|start|>hello<think> hello<|end|>',
)
ROWS = 600
# Names of pre-tokenizers in files of others.
BYTE_LEVEL = ('smollm', 'llama-bpe', 'qwen2', 'deepseek-r1-qwen', 'starcoder', 'smaug-bpe')


def published(cuts, ignore_merges=False, normalizer=None, bos=False, **special):
  """A byte-level tokenizer put together as in a published tokenizer.json."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = [*alphabet, *(merge.replace(' ', '') for merge in MERGES), 'unmerged', *SPECIALS]
  merges = [tuple(merge.split(' ')) for merge in MERGES]
  backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges, ignore_merges=ignore_merges))
  backend.pre_tokenizer = cuts
  backend.normalizer = normalizer
  backend.decoder = decoders.ByteLevel()
  steps = [processors.ByteLevel(trim_offsets=False)]
  if bos:
    ids = [('<|start|>', vocab.index('<|start|>'))]
    steps.append(processors.TemplateProcessing(single='<|start|> $A', special_tokens=ids))
  backend.post_processor = processors.Sequence(steps)
  backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS[:3]])
  backend.add_tokens([AddedToken('<think>', special=False, normalized=False)])
  special = {'bos_token': '<|start|>', 'eos_token': '<|end|>'} | special
  return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def split(pattern):
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(pattern), behavior='isolated', invert=False),
      pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
    ]
  )


def gemma():
  """SentencePiece as transformers writes Gemma's: no space before the text, and a split that finds none."""
  tokenizer = metaspace()
  backend = tokenizer.backend_tokenizer
  backend.normalizer = normalizers.Replace(' ', '▁')
  backend.pre_tokenizer = pre_tokenizers.Split(' ', behavior='merged_with_previous')
  return tokenizer


def metaspace(scheme='first', merges=None, **options):
  """SentencePiece as newer conversions of Llama 2 and Mistral write it; merges are the pairs of PIECES."""
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *PIECES]
  merges = merges or [('▁', 'a'), ('b', 'c'), ('a', 'b'), ('▁', 'ab'), ('▁a', 'b'), ('c', 'c')]
  options = {'fuse_unk': True, 'byte_fallback': True, 'unk_token': '<unk>'} | options
  backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, **options))
  backend.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme=scheme, split=False)
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>'
  )


DIGITS = pre_tokenizers.Sequence(
  [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
PUBLISHED = {
  'smollm': lambda: published(DIGITS, unk_token='<|end|>'),
  'llama-bpe': lambda: published(split(LLAMA3), ignore_merges=True, bos=True),
  'dbrx': lambda: published(split(LLAMA3)),
  'qwen2': lambda: published(split(QWEN2), normalizer=normalizers.NFC(), bos_token=None, pad_token='<|end|>'),
  'gpt-2': lambda: published(PLAIN),
}
MADE = PUBLISHED | {'spm': metaspace, 'gemma': gemma}


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
  path = tmp_path_factory.mktemp('source') / 'tiny.gguf'
  read = {f'{pre} read': byte_level(path, pre) for pre in BYTE_LEVEL}
  read['both ends'] = byte_level(path, 'smollm', add_add_bos_token=True, add_add_eos_token=True)
  read['spm read'] = sentence_piece(path)
  read['spm without prefix'] = sentence_piece(path, prefix=False)
  return read | {name: make() for name, make in MADE.items()}


NAMES = [*(f'{pre} read' for pre in (*BYTE_LEVEL, 'spm')), 'both ends', 'spm without prefix', *MADE]


def write(path, tokenizer, rows=ROWS):
  config = tiny_config('llama', UNIFORM[:1], vocab_size=rows)
  write_gguf(config, random_params(config), path, tokenizer=tokenizer, kind='F32', name='tiny')


@pytest.fixture(scope='module')
def files(tokenizers, tmp_path_factory):
  root = tmp_path_factory.mktemp('gguf')
  for name, tokenizer in tokenizers.items():
    write(root / f'{name}.gguf', tokenizer)
  return root


def texts(name):
  """Without what llama.cpp does otherwise: it never normalises, and adds its space before another one."""
  return [text for text in COMPOSED if name != 'spm' or not text.startswith((' ', '<'))]


@pytest.fixture(scope='module')
def answers(files):
  return ask({name: Job(files / f'{name}.gguf', texts(name)) for name in NAMES})


@needs_llama_cpp
@pytest.mark.parametrize('name', NAMES)
def test_llama_cpp_gives_the_same_ids(name, tokenizers, answers):
  assert answers[name].ids == tokenizers[name](texts(name)).input_ids


@pytest.mark.parametrize('name', NAMES)
def test_our_own_reader_gives_the_same_ids(name, tokenizers, files):
  path = files / f'{name}.gguf'
  before, after = tokenizers[name], load_tokenizer(path)
  assert after(texts(name)).input_ids == before(texts(name)).input_ids
  for special in ('bos', 'eos', 'unk', 'pad'):
    assert getattr(after, f'{special}_token_id') == getattr(before, f'{special}_token_id'), special
  metadata = open_file(path).metadata
  tokens, types = metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.token_type']
  assert len(tokens) == len(types) == ROWS
  unused = set(range(ROWS)) - set(before.get_vocab().values())
  assert unused and unused == {i for i, kind in enumerate(types) if kind == 5}
  expected = name.removesuffix(' read') if name != 'deepseek-r1-qwen read' else 'qwen2'
  if expected in PUBLISHED:
    assert metadata['tokenizer.ggml.pre'] == expected


def test_both_ways_to_write_a_split_are_known():
  """Converters from tiktoken remove what the expression does not match, which is nothing."""
  cuts = [
    pre_tokenizers.Split(Regex(LLAMA3), behavior='removed', invert=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ]
  check_gguf_tokenizer(published(pre_tokenizers.Sequence(cuts)))


def test_an_added_token_beyond_the_embedding_is_left_out(tmp_path):
  """As Gemma 3's checkpoints have one for images."""
  tokenizer, path = gemma(), tmp_path / 'model.gguf'
  rows = len(tokenizer)
  tokenizer.add_special_tokens({'additional_special_tokens': ['<image>']})
  write(path, tokenizer, rows)
  assert len(open_file(path).metadata['tokenizer.ggml.tokens']) == rows
  assert load_tokenizer(path)(list(TEXTS)).input_ids == tokenizer(list(TEXTS)).input_ids


def test_an_end_of_text_beyond_the_embedding_is_refused(tmp_path):
  tokenizer = gemma()
  rows = len(tokenizer)
  tokenizer.add_special_tokens({'eos_token': '<end>'})
  assert f'ids up to {rows}' in refused(write, tmp_path / 'm.gguf', tokenizer, rows)
  assert not list(tmp_path.iterdir())


def test_special_tokens_of_each_sort(files):
  metadata = open_file(files / 'smollm.gguf').metadata
  types = dict(zip(metadata['tokenizer.ggml.tokens'], metadata['tokenizer.ggml.token_type'], strict=True))
  assert (types['<|start|>'], types['<|end|>'], types['<think>'], types['unmerged']) == (3, 3, 4, 1)
  spm = open_file(files / 'spm.gguf').metadata
  types = dict(zip(spm['tokenizer.ggml.tokens'], spm['tokenizer.ggml.token_type'], strict=True))
  assert (types['<unk>'], types['</s>'], types['<0x0A>'], types['▁ab']) == (2, 3, 6, 1)


def changed(tokenizer, change):
  """The tokenizer after a change of what its tokenizer.json says."""
  data = json.loads(tokenizer.backend_tokenizer.to_str())
  change(data)
  special = {'bos_token': tokenizer.bos_token, 'eos_token': tokenizer.eos_token}
  backend = Tokenizer.from_str(json.dumps(data))
  return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def word_level():
  return PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({'a': 0, '[UNK]': 1}, '[UNK]')), eos_token='a'
  )


def with_prompt():
  tokenizer = published(PLAIN)
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single='<|start|> <think> $A', special_tokens=[('<|start|>', 268), ('<think>', 270)]
  )
  return tokenizer


REFUSED = {
  'not from the tokenizers library': object,
  'not BPE': word_level,
  'no EOS': lambda: published(PLAIN, eos_token=None),
  'more than BOS and EOS': with_prompt,
  'N}+|': lambda: published(split(QWEN2.replace('N}|', 'N}+|'))),
  'NFKC': lambda: published(split(QWEN2), normalizer=normalizers.NFKC()),
  'ignore_merges": true': lambda: published(split(QWEN2), ignore_merges=True),
  'byte_fallback without': lambda: changed(
    metaspace(), lambda d: d['model']['vocab'].update({'zero': d['model']['vocab'].pop('<0x00>')})
  ),
  "not SentencePiece's": lambda: changed(metaspace(), lambda d: d['pre_tokenizer'].update(split=True)),
  "no merge of '▁a' and 'b'": lambda: metaspace(
    merges=[('▁', 'a'), ('b', 'c'), ('a', 'b'), ('▁', 'ab'), ('c', 'c')]
  ),
  "form '▁ab' are not adjacent": lambda: metaspace(
    merges=[('▁', 'a'), ('b', 'c'), ('a', 'b'), ('▁', 'ab'), ('c', 'c'), ('▁a', 'b')]
  ),
}


@pytest.mark.parametrize('reason', REFUSED)
def test_what_llama_cpp_has_no_equal_of_is_refused(reason):
  assert reason in refused(check_gguf_tokenizer, REFUSED[reason]())
