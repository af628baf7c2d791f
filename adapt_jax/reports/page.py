"""Shared parts of all report pages: style, boxes and tables. The pages need only a browser."""

import html
from collections.abc import Sequence

from adapt_jax.reports import charts

_REFRESH_SECONDS = 20

_STYLE = """
:root{color-scheme:light dark;--ink:#1b2330;--muted:#586374;--line:#dce1e8;--paper:#fff;--ground:#f3f5f8}
@media (prefers-color-scheme:dark){
:root{--ink:#e6eaf0;--muted:#9aa7b8;--line:#333c49;--paper:#1a2029;--ground:#11151b}}
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
.chart{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:500;font-size:13px} th:first-child,td:first-child{text-align:left}
th{white-space:normal} @media(max-width:600px){table,th{font-size:12px} th,td{padding:6px 5px}}
tr:last-child td{border-bottom:0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace}
"""


def page(title: str, body: str, *, running: bool) -> str:
  """A page with `body` in the common style; it reloads automatically if `running`."""
  refresh = f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">\n' if running else ''
  dark = f'@media (prefers-color-scheme:dark){{\n{charts.DARK}}}'
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
{refresh}<title>{html.escape(title)}</title>
<style>{_STYLE}{charts.LIGHT}
{dark}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def cards(kind: str, contents: Sequence[str]) -> str:
  """A row of boxes with HTML contents, '' if all are empty; kind: grid (of charts) or facts."""
  inside = ''.join(f'<div class="card">{c}</div>' for c in contents if c)
  return f'<div class="{kind}">{inside}</div>' if inside else ''


def html_table(rows: list[list[str]]) -> str:
  """An HTML table of plain text; the first row is the header."""
  lines = [''.join(f'<th>{html.escape(name)}</th>' for name in rows[0])]
  lines += [''.join(f'<td>{html.escape(cell)}</td>' for cell in row) for row in rows[1:]]
  return '<table>' + '\n'.join(f'<tr>{line}</tr>' for line in lines) + '</table>'
