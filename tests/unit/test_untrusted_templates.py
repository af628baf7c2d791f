"""Chat templates that loop, recurse, divide by zero or fill the memory are refused in one line."""

import contextlib
import errno
import os
import resource
import signal
import threading
import time

import pytest

from adapt_jax.data.chats import render_all
from adapt_jax.data.documents import Document
from adapt_jax.data.tokenise import encode_all, encode_prompts
from adapt_jax.generation.self_text import _before_user
from adapt_jax.machine import bounded
from adapt_jax.models.errors import InputError
from tests.support.tokenizers_for_tests import render, tiny_tokenizer

MESSAGES = [{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}]
PLAIN = '{% for m in messages %}{{ m.content }};{% endfor %}'
ONCE = "{% if messages[0]['content'] == 'Q' %}"
ENDLESS = {
  'loops': '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
  'power': '{{ (10 ** messages|length ** 30) ** 99999 }}',
  'digits': "{{ ('9' * 4000)|int ** 99999 }}",
}
HUGE = {
  'product': "{{ 'a' * 3000000000 }}",
  'width': "{{ '%3000000000d' % 1 }}",
  'doubled': '{% set n = namespace(s="a") %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}',
  'output': "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
  'list': '{{ [0] * 3000000000 }}',
}
BROKEN = {
  'zero': ('{{ 1 // 0 }}', 'ZeroDivisionError'),
  'recursion': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'RecursionError'),
  'nested': ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', ''),
  'range': ('{% for i in range(10 ** 12) %}{% endfor %}', 'OverflowError'),
  'missing': ('{{ messages[99].content.x }}', ''),
  'surrogate': ('{{ "\\ud800" }}', 'UnicodeEncodeError'),
  'unfinished': ('{% for', ''),
}


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
  monkeypatch.setattr(bounded, 'SECONDS', 1)


def refused(function, *arguments) -> str:
  start = time.monotonic()
  with pytest.raises(InputError) as error:
    function(*arguments)
  assert time.monotonic() - start < 30 and '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize('template', [*ENDLESS.values(), *HUGE.values()], ids=[*ENDLESS, *HUGE])
def test_a_template_without_end_is_stopped(template):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  message = refused(render, Document('chats.jsonl:7', MESSAGES), tiny_tokenizer(template))
  assert message.startswith('chats.jsonl:7: the chat template needs more than 10 s of computing or 1 GiB')
  assert 'set data.chat_template' in message
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB, of this process


@pytest.mark.parametrize('name', BROKEN)
def test_a_template_that_fails_refuses_the_conversation(name):
  template, says = BROKEN[name]
  message = refused(render, Document('chats.jsonl:7', MESSAGES), tiny_tokenizer(template))
  assert message.startswith('chats.jsonl:7: the chat template rejects this conversation (')
  assert says in message


@pytest.mark.parametrize('template', [ENDLESS['loops'], HUGE['product'], BROKEN['zero'][0]])
def test_prompts_and_generated_text_are_bounded_too(template):
  tokenizer = tiny_tokenizer(template)
  assert 'the chat template rejects a prompt' in refused(encode_prompts, ['text'], tokenizer, True)
  assert 'the chat template rejects a user message' in refused(_before_user, tokenizer)


def batches(count=3):
  return iter(
    [[Document('a:1', MESSAGES), Document('a:2', 'plain text'), Document('a:3', MESSAGES[:1])]] * count
  )


def test_in_worker_processes_and_in_threads(monkeypatch):
  monkeypatch.setattr('adapt_jax.data.tokenise._ALONE_CHARS', 0)
  alone = list(encode_all(batches(), tiny_tokenizer(), workers=1))
  assert [x.tokens.tolist() for x in encode_all(batches(), tiny_tokenizer(), workers=2)] == [
    x.tokens.tolist() for x in alone
  ]
  chat, tokenizer, found = Document('here', MESSAGES), tiny_tokenizer(HUGE['product']), []
  thread = threading.Thread(target=lambda: found.append(refused(render, chat, tokenizer)))
  thread.start()
  thread.join()
  assert found and 'here: the chat template needs more' in found[0]


def test_a_worker_process_stops_a_template_too(monkeypatch):
  """The first batch, of plain text, is tokenised by this process."""
  monkeypatch.setattr('adapt_jax.data.tokenise._ALONE_CHARS', 0)
  work = iter([[Document('a:1', 'text')], [Document('a:2', MESSAGES)]])
  tokenizer = tiny_tokenizer(HUGE['product'])
  assert 'a:2: the chat template needs more' in refused(lambda: list(encode_all(work, tokenizer, workers=2)))


def test_order_errors_and_reading_ahead():
  """What comes before a broken row or a refused conversation is still given; nothing is lost between."""

  def documents():
    yield Document('a:1', MESSAGES)
    yield Document('a:2', 'plain')
    yield Document('a:3', [{'role': 'user', 'content': 'Q3'}])
    raise InputError('a:4: broken')

  texts = render_all(documents(), tiny_tokenizer(PLAIN))
  assert [next(texts).text for _ in range(3)] == ['Q;A;', 'plain', 'Q3;']
  assert refused(next, texts) == 'a:4: broken'
  many = [Document(str(i), [{'role': 'user', 'content': 'x' * 999 + str(i)}]) for i in range(100)]
  found = [text.text for text in render_all(iter(many), tiny_tokenizer(PLAIN))]
  assert found == [document.content[0]['content'] + ';' for document in many]
  template = PLAIN + "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
  texts = render_all(
    [many[0], Document('b:1', [{'role': 'user', 'content': 'bad'}])], tiny_tokenizer(template)
  )
  assert next(texts).text.startswith('xxx')
  assert refused(next, texts) == 'b:1: the chat template rejects this conversation (no)'


def test_nothing_stays_of_the_process(monkeypatch, capfd):
  """No child, no descriptor, no words on the screen, and the signals are handled as before."""
  before = len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0
  tokenizer = tiny_tokenizer(PLAIN)
  tokenizer(['text'] * 8)  # with threads
  assert bounded.each(lambda item: item * 2, [1, 2]) == [2, 4]
  render(Document('', MESSAGES), tokenizer)
  with contextlib.suppress(ChildProcessError):
    assert os.waitpid(-1, os.WNOHANG) == (0, 0)  # other children live
  assert not before or len(os.listdir('/proc/self/fd')) == before
  assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
  assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
  assert capfd.readouterr() == ('', '')


def test_many_short_conversations_are_measured_once_each(monkeypatch):
  """Not again with every further one: a part holds tens of thousands of them."""
  asked = []
  size = Document.size.fget
  monkeypatch.setattr(Document, 'size', property(lambda self: asked.append(1) or size(self)))
  chats = [Document('', MESSAGES)] * 500
  assert sum(1 for _ in render_all(chats, tiny_tokenizer(PLAIN))) == 500
  assert len(asked) <= 2 * 500


def test_the_environment_stays_as_it_was(monkeypatch):
  """Set for good, it would take from tokenizers the protection of forks that others make."""
  monkeypatch.delenv('TOKENIZERS_PARALLELISM', raising=False)
  render(Document('', MESSAGES), tiny_tokenizer(PLAIN))
  assert 'TOKENIZERS_PARALLELISM' not in os.environ


def test_where_no_process_can_be_started(monkeypatch):
  def fork():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

  monkeypatch.setattr(os, 'fork', fork)
  assert 'no process can be started for a chat template (Cannot allocate' in refused(
    render, Document('', MESSAGES), tiny_tokenizer(PLAIN)
  )


def test_a_long_conversation_has_the_time_for_each_rendering():
  """A hundred renderings that take a hundredth of the limit, and more than it together."""
  slow = PLAIN + '{% for i in range(60000) %}{% endfor %}'
  chat = [{'role': role, 'content': 'x'} for _ in range(300) for role in ('user', 'assistant')]
  start = time.monotonic()
  assert render(Document('', chat), tiny_tokenizer(slow)).text == 'x;' * 600
  assert time.monotonic() - start > 1
