"""What the documentation site changes in its pages: links to files outside docs/ become the files' names."""

import re
from typing import Any

_OUTSIDE = re.compile(r'\[([^\]]*)\]\(\.\./[^)]*\)')


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Called by mkdocs for every page."""
  return _OUTSIDE.sub(r'\1', markdown)
