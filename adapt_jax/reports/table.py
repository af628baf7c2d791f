"""A table, as Markdown, HTML or CSV."""

import csv
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from typing import Any


def _bar(text: str) -> str:
  return text.replace('|', r'\|')


@dataclasses.dataclass(frozen=True)
class Table:
  """The names of columns, and rows of values. None is an empty cell."""

  head: Sequence[str]
  rows: Sequence[Sequence[Any]]

  def _lines(self) -> list[list[str]]:
    return [['' if cell is None else str(cell) for cell in row] for row in (self.head, *self.rows)]

  def markdown(self, escape: Callable[[str], str] = _bar) -> str:
    """Markdown; `escape` is applied to each cell."""
    head, *rows = [' | '.join(map(escape, line)) for line in self._lines()]
    return '\n'.join(f'| {line} |' for line in (head, ' | '.join(['---'] * len(self.head)), *rows))

  def html(self) -> str:
    """HTML, in a box that scrolls."""
    head, *rows = [[html.escape(cell) for cell in line] for line in self._lines()]
    lines = [f'<th>{"</th><th>".join(head)}</th>', *(f'<td>{"</td><td>".join(row)}</td>' for row in rows)]
    body = '\n'.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="card scroll"><table>{body}</table></div>'

  def csv(self) -> str:
    """CSV with values in full."""
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(self._lines())
    return out.getvalue()
