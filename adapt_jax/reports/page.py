"""Shared parts of all report pages. The pages need only a browser."""

import html
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapt_jax.reports import charts

_REFRESH_SECONDS = 20

_STYLE = """
:root{color-scheme:light dark;--ground:#f3f5f8}
@media(prefers-color-scheme:dark){:root{--ground:#11151b}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1400px;margin:auto;padding:16px}
h1{font-size:22px;margin:0;overflow-wrap:anywhere} h2{font-size:17px;margin:28px 0 8px}
p{margin:6px 0;color:var(--muted);font-size:13px;overflow-wrap:anywhere}
.state{color:var(--ink);font-size:15px}
.grid,.facts{display:grid;gap:12px;margin:12px 0}
.grid{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.facts{grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr))}
.card{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:10px;min-width:0}
.card b{display:block;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:13px}
.chart{display:block;width:100%;height:auto} .chart text{font-family:system-ui,sans-serif!important}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:500;font-size:13px} th:first-child,td:first-child{text-align:left}
th{white-space:normal} @media(max-width:600px){table,th{font-size:11px} th,td{padding:6px 3px}}
tr:last-child td{border-bottom:0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace}
.scroll+.scroll{margin-top:12px}
.words :is(th,td):last-child{white-space:normal;overflow-wrap:anywhere;text-align:left}
.card .word{display:inline-block;color:inherit;font-size:inherit}
"""


def page(title: str, state: str, body: Iterable[str], made: Mapping[str, Any], *, running: bool) -> str:
  """A page with a title, the state and HTML parts; it reloads itself if `running`.

  made: a report, or its parts `command` and `versions`.
  """
  e = html.escape
  refresh = f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}"/>\n' if running else ''
  inside = '\n'.join(filter(None, body))
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width,initial-scale=1"/>
{refresh}<title>{e(title)}</title>
<style>{charts.css()}{_STYLE}</style>
</head>
<body>
<main>
<h1>{e(title)}</h1>
<p class="state">{e(state)}</p>
{inside}
<h2>Command</h2><div class="card"><pre>{words(made['command'])}</pre></div>
<p>{e(', '.join(f'{name} {version}' for name, version in made.get('versions', {}).items()))}</p>
</main>
</body>
</html>
"""


def words(command: str) -> str:
  """HTML in which lines break between the words of a command, not after the hyphens of --config."""
  return ' '.join(f'<span class="word">{html.escape(word)}</span>' for word in command.split(' '))


def due(path: pathlib.Path, running: bool) -> bool:
  """Whether to write a page, which takes time: at the end, and before as often as browsers reload it."""
  return not (running and path.exists() and 0 <= time.time() - path.stat().st_mtime < _REFRESH_SECONDS)


def section(title: str, *parts: str) -> str:
  """A title over HTML parts; '' if all are empty."""
  return f'<h2>{html.escape(title)}</h2>{"".join(parts)}' if any(parts) else ''


def notes(lines: Iterable[str]) -> str:
  """A paragraph for each line of plain text."""
  return ''.join(f'<p>{html.escape(line)}</p>' for line in lines)


def cards(kind: str, contents: Sequence[str]) -> str:
  """A row of boxes with HTML contents, '' if all are empty; kind: grid or facts."""
  inside = ''.join(f'<div class="card">{c}</div>' for c in contents if c)
  return f'<div class="{kind}">{inside}</div>' if inside else ''


def figures(drawn: Iterable[str]) -> str:
  """A row of charts; '' if all are empty."""
  return cards('grid', [charts.inline(chart) for chart in drawn if chart])
