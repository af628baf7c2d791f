"""Trimmed tokenizers: the same tokens on the text that they were trimmed to, and no other text is lost."""

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from adapt_jax.models.formats.trimmed_tokenizer import needed_ids, trim_tokenizer
from tests.formats.test_gguf_vocab import DIGITS, LLAMA3, published, split, word_level
from tests.support.helpers import refused
from tests.support.runs import ROOT

PAGES = [path.read_text() for path in sorted((ROOT / 'docs').glob('*.md'))]
OTHER = 'Naïve façades of Köln, 東京 and Москва cost €1,250.75\n\n  – or more 😀.'
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
SPECIAL = ['<unk>', '<s>', '</s>', '<|user|>']


def trained(model, cut, decoder, trainer):
  """A tokenizer trained on this project's pages, with BOS before a text and a token after the vocabulary."""
  backend = Tokenizer(model)
  backend.pre_tokenizer, backend.decoder = cut, decoder
  backend.train_from_iterator(PAGES, trainer)
  if getattr(model, 'byte_fallback', False):
    backend = with_bytes(backend)
  backend.add_tokens(['<think>'])
  bos = [('<s>', backend.token_to_id('<s>'))]
  backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=bos)
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>'
  )
  tokenizer.chat_template = "{{ '<|user|>' + messages[0]['content'] }}"
  return tokenizer


def with_bytes(backend):
  """With the ordinary tokens of bytes, which a trainer would make special."""
  data = json.loads(backend.to_str())
  vocab = data['model']['vocab']
  vocab |= {token: len(vocab) + i for i, token in enumerate(BYTES)}
  return Tokenizer.from_str(json.dumps(data))


TRAINING = {'special_tokens': SPECIAL, 'show_progress': False, 'vocab_size': 1500}


def byte_level(cut=DIGITS):
  trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **TRAINING)
  return trained(models.BPE(), cut, decoders.ByteLevel(), trainer)


WORDS = pre_tokenizers.Metaspace('▁', prepend_scheme='first')
TO_TEXT = decoders.Sequence(
  [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
)


def sentence_piece():
  model = models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True)
  return trained(model, WORDS, TO_TEXT, trainers.BpeTrainer(**TRAINING))


def unigram():
  trainer = trainers.UnigramTrainer(unk_token='<unk>', **TRAINING)
  return trained(models.Unigram(), WORDS, decoders.Metaspace(), trainer)


def whole_words():
  """As Llama 3's: words of the vocabulary are found whole, though no merges form them."""
  made = published(split(LLAMA3), ignore_merges=True, bos=True)
  made.chat_template = '{{ messages }}'
  return made


def converted():
  """As newer conversions of Llama 2: all pairs that form a token are merges; a whole text is one word."""
  made = sentence_piece()
  data = json.loads(made.backend_tokenizer.to_str())
  model = data['model']
  vocab = {token: i for token, i in model['vocab'].items() if token not in {*SPECIAL, *BYTES}}
  pairs = [(i, t[:cut], t[cut:]) for t, i in vocab.items() for cut in range(len(t) - 1, 0, -1)]
  known = [pair for pair in pairs if {*pair[1:]} <= vocab.keys()]
  model['merges'] = [pair for _, *pair in sorted(known, key=lambda pair: pair[0])]
  data['pre_tokenizer']['split'] = False
  special = {f'{name}_token': getattr(made, f'{name}_token') for name in ('bos', 'eos', 'unk', 'pad')}
  made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **special)
  made.chat_template = '{{ messages }}'
  return made


KINDS = {
  'byte level': byte_level,
  'bytes split by an expression': lambda: byte_level(split(LLAMA3)),
  'whole words': whole_words,
  'SentencePiece': sentence_piece,
  'SentencePiece, converted': converted,
  'unigram': unigram,
}


@pytest.fixture(scope='module', params=KINDS)
def tokenizer(request):
  return KINDS[request.param]()


def trim(tokenizer, texts):
  used = {i for ids in tokenizer(texts)['input_ids'] for i in ids}
  ids = needed_ids(tokenizer, used)
  assert used <= set(ids)
  return ids, trim_tokenizer(tokenizer, ids)


def test_the_text_has_the_same_tokens(tokenizer):
  draw = random.Random(0)
  smallest = len(tokenizer)
  for _ in range(8):
    lines = [line for page in draw.sample(PAGES, 2) for line in page.splitlines(keepends=True)]
    texts = [''.join(draw.sample(lines, 20)), *draw.sample(lines, 5), 'unmerged hello abcc']
    ids, trimmed = trim(tokenizer, texts)
    before, after = tokenizer(texts)['input_ids'], trimmed(texts)['input_ids']
    assert [[ids[i] for i in row] for row in after] == before
    for old, new in zip(before, after, strict=True):
      assert trimmed.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
      assert trimmed.decode(new) == tokenizer.decode(old)
    smallest = min(smallest, len(trimmed))
  assert smallest < len(tokenizer)


def test_other_text_has_valid_tokens_and_comes_back(tokenizer):
  ids, trimmed = trim(tokenizer, ['The model is pruned.'])
  assert sorted(trimmed.get_vocab().values()) == list(range(len(ids)))
  for text in (OTHER, *PAGES[:3]):
    found, before = trimmed(text)['input_ids'], tokenizer(text)['input_ids']
    assert max(found) < len(ids) and len(found) >= len(before)
    shown = trimmed.decode(found, skip_special_tokens=True)
    assert shown == tokenizer.decode(before, skip_special_tokens=True)
    assert shown == text or tokenizer.unk_token_id in before  # the Unigram here has no bytes


def test_special_tokens_template_and_settings_stay(tokenizer, tmp_path):
  _, trimmed = trim(tokenizer, ['a'])
  trimmed.save_pretrained(tmp_path)
  for found in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
    assert found.special_tokens_map == tokenizer.special_tokens_map
    assert found.chat_template == tokenizer.chat_template
    assert found.model_max_length == tokenizer.model_max_length
    for token in tokenizer.get_added_vocab():
      text = f'a{token}b'
      assert token in found.tokenize(text) and found.tokenize(text) == tokenizer.tokenize(text)
    assert found.convert_ids_to_tokens(found('a').input_ids) == tokenizer.convert_ids_to_tokens(
      tokenizer('a').input_ids
    )
    assert found(OTHER).input_ids == trimmed(OTHER).input_ids


@pytest.mark.parametrize(('kind', 'make'), [(LlamaTokenizer, converted), (Qwen2Tokenizer, byte_level)])
def test_classes_that_build_their_tokenizer_themselves(kind, make, tmp_path):
  model = json.loads(make().backend_tokenizer.to_str())['model']
  kind(vocab=model['vocab'], merges=[tuple(merge) for merge in model['merges']]).save_pretrained(tmp_path)
  tokenizer = AutoTokenizer.from_pretrained(tmp_path)
  ids, trimmed = trim(tokenizer, PAGES[:1])
  assert type(trimmed) is type(tokenizer) is kind and len(ids) < len(tokenizer)
  assert trimmed.tokenize(PAGES[0]) == tokenizer.tokenize(PAGES[0])


def test_only_what_is_needed_stays():
  tokenizer = published(DIGITS)
  ids = needed_ids(tokenizer, set(tokenizer(' hello', add_special_tokens=False)['input_ids']))
  longer = {token for token in tokenizer.convert_ids_to_tokens(ids) if len(token) > 1}
  assert longer == {'he', 'll', 'hell', 'hello', 'Ġhello'} | tokenizer.get_added_vocab().keys()


def changed(tokenizer, **fields):
  data = json.loads(tokenizer.backend_tokenizer.to_str())
  data['model'] |= fields
  return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token='<|end|>')


REFUSED = {
  'WordLevel': word_level,
  'tokenizers library': object,
  'dropout': lambda: changed(published(DIGITS), dropout=0.5),
  'end_of_word_suffix': lambda: changed(published(DIGITS), end_of_word_suffix='</w>'),
}


@pytest.mark.parametrize('reason', REFUSED)
def test_others_are_refused_with_a_reason(reason):
  assert reason in refused(needed_ids, REFUSED[reason](), {0})
