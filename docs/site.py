"""Hook of the documentation site: files outside docs/ that a page links to become part of it.

Pages link to files as the repository has them, such as ../CHANGELOG.md. On the site, Markdown files are pages
and other files are copied, under `files/` with their path. A link to a folder or a missing file is an error.
"""

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_INLINE_CODE = re.compile(r'(?<=<code>)[^<]+(?=</code>)')
_NAME = re.compile(r'(?<!\S)(?=\S*-)\S{2,40}(?!\S)')  # with a hyphen, where browsers break lines
_LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)#\s]+)')


def _source(uri: str) -> str:
  """The path in the repository of a file of the site."""
  return uri.removeprefix('files/') if uri.startswith('files/') else f'docs/{uri}'


def _uri(path: str) -> str:
  """The inverse of `_source`."""
  return path.removeprefix('docs/') if path.startswith('docs/') else f'files/{path}'


def _linked(text: str, source: str) -> set[str]:
  """Paths in the repository of what a page links to."""
  return {posixpath.normpath(posixpath.join(posixpath.dirname(source), link)) for link in _LINK.findall(text)}


def on_files(files: Files, config: Any) -> Files:
  """Called by mkdocs with the files of docs/: adds what they link to, and what these link to."""
  waiting = [file for file in files if file.src_uri.endswith('.md') and not file.inclusion.is_excluded()]
  while waiting:
    file = waiting.pop()
    for path in sorted(_linked(file.content_string, _source(file.src_uri))):
      if not (_ROOT / path).is_file():
        raise PluginError(f'{file.src_uri} links to {path}, which is no file')
      if files.get_file_from_path(_uri(path)) is None:
        files.append(added := File.generated(config, _uri(path), abs_src_path=str(_ROOT / path)))
        waiting += [added] if path.endswith('.md') else []
  return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
  """Called by mkdocs for every page: links lead to where the site has the files."""
  uri = page.file.src_uri

  def moved(link: re.Match[str]) -> str:
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_source(uri)), link[1]))
    return posixpath.relpath(_uri(path), posixpath.dirname(uri) or '.')

  return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
  """Called by mkdocs for every page: marks names in inline code that are not to be broken."""

  def marked(code: re.Match[str]) -> str:
    return _NAME.sub(r'<span class="word">\g<0></span>', code[0])

  return _INLINE_CODE.sub(marked, html)
