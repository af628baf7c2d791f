"""Where a model comes from, as exports tell it: without local paths."""

import os
import re

import pytest

from adapt_jax.reports.origin import Origin, origin_of, without_paths
from adapt_jax.reports.report import versions
from tests.support.helpers import tiny_config


@pytest.mark.parametrize(
  ('value', 'public'),
  [
    ('/data/models/a model', 'a model'),
    ('~/texts/wiki.txt', 'wiki.txt'),
    ('../secret/run', 'run'),
    ('here/model', 'model'),
    ('org/name', 'org/name'),
    ('https://hub.example/org/name', 'https://hub.example/org/name'),
    ({'command': "python /data/x/main.py --config.train.source='/a/my texts/b.txt,w=/c d/e.txt,o/s' --n=1/2"},
     {'command': 'python main.py --config.train.source=b.txt,w=e.txt,o/s --n=1/2'}),
    ('web=/data/my texts/pages.jsonl', 'web=pages.jsonl'),
    ('see (/data/x/y) and file:///data/z', 'see (y) and z'),
    (['/a/b', {'c': '/d/e'}, 5, None], ['b', {'c': 'e'}, 5, None]),
  ],
)  # fmt: skip
def test_local_paths_become_names(value, public, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.makedirs('here/model')
  assert without_paths(value) == public


def test_an_origin_comes_back_from_its_report_and_keeps_the_first_sizes():
  config = tiny_config()
  origin = Origin('org/name', hub=True).sized(config)
  assert origin_of(origin.report()) == origin == origin.sized(tiny_config(vocab_size=7))
  assert (origin.public_name, Origin('/a/b').public_name) == ('org/name', 'b')


def test_reports_name_the_program_that_made_them():
  assert re.fullmatch(r'\d+\.\d+\.\d+( \([0-9a-f]{7,40}(-dirty)?\))?', versions()['adapt-jax'])
