"""report.html: the content of report.md as one page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polar_jax.report import plots

if TYPE_CHECKING:
  from markdown_it import MarkdownIt
  from markdown_it.token import Token

_CSS_DPI = 96  # pixels of a page per inch
# Reports hold text of users: raw HTML is shown as text, and nothing becomes a link.
_DISABLED = ('html_block', 'html_inline', 'link', 'autolink', 'reference')
# Should text ever become markup by mistake, the browser still loads nothing and runs nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b636b; --line: #dfe3e7; --back: #ffffff; --panel: #f5f7f9; --link: #0062a3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --soft: #9aa3ab; --line: #343a40; --back: #16191c; --panel: #1f2327; --link: #6db8ee; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
.page { display: grid; grid-template-columns: 15rem minmax(0, 1fr); max-width: 84rem; margin: 0 auto; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 2.2rem 1rem; font-size: .9rem; }
nav strong { display: block; margin-bottom: .5rem; color: var(--soft); font-weight: 600; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li { margin: .25rem 0; }
nav li.h3 { padding-left: 1rem; }
nav a { color: var(--link); text-decoration: none; }
nav a:hover { text-decoration: underline; }
main { padding: 1rem 2rem 4rem; min-width: 0; }
main > p, main > ul { max-width: 52rem; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 1rem 0; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; background: var(--panel); padding: .1em .3em; border-radius: 4px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { overflow-wrap: break-word; max-width: 28rem; }
th { background: var(--panel); font-weight: 600; }
thead:not(:has(th:not(:empty))) { display: none; }
td[style*="right"] { white-space: nowrap; }
tbody tr:hover { background: var(--panel); }
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: .5rem; }
figure img { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
@media (max-width: 60rem) {
  .page { display: block; }
  nav { position: static; max-height: none; padding: 1rem 1rem 0; }
  nav ul { columns: 2; }
  main { padding: 0 1rem 3rem; }
}
@media print { nav { display: none; } .page { display: block; } }
"""


def page(markdown: str, folder: pathlib.Path, figures: Sequence[str]) -> str:
  """Return a self-contained HTML page of a report.

  Args:
    markdown: content of report.md.
    folder: folder that the links of figures are relative to.
    figures: links of the figures to embed; any other image is replaced by its caption.
  """
  parser = _parser(folder, figures)
  tokens = parser.parse(markdown)
  headings = _number_headings(tokens)
  _unwrap_figures(tokens)
  title = headings[0][2] if headings else 'Report'
  contents = ''.join(f'<li class="{tag}"><a href="#{anchor}">{text}</a></li>\n' for tag, anchor, text in headings if tag != 'h1')
  body = parser.renderer.render(tokens, parser.options, {})
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<div class="page">\n'
    f'<nav aria-label="Contents"><strong>Contents</strong>\n<ul>\n{contents}</ul>\n</nav>\n<main>\n{body}</main>\n</div>\n'
    '</body>\n</html>\n'
  )


def _parser(folder: pathlib.Path, figures: Sequence[str]) -> MarkdownIt:
  """Return a Markdown parser whose renderer embeds figures and lets wide tables scroll."""
  from markdown_it import MarkdownIt

  parser = MarkdownIt('commonmark', {'html': False}).enable('table').disable(list(_DISABLED))

  def image(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    link, caption = str(tokens[index].attrs['src']), html.escape(tokens[index].content)
    if link not in figures:
      return caption
    content = (folder / link).read_bytes()
    width = int.from_bytes(content[16:20], 'big') * _CSS_DPI // plots.DPI  # the same size of text in every figure
    data = base64.b64encode(content).decode()
    picture = f'<img alt="{caption}" width="{width}" src="data:image/png;base64,{data}">'
    return f'<figure>\n{picture}\n<figcaption>{caption}</figcaption>\n</figure>\n'

  parser.add_render_rule('image', image)
  parser.add_render_rule('table_open', lambda *_: '<div class="scroll">\n<table>\n')
  parser.add_render_rule('table_close', lambda *_: '</table>\n</div>\n')
  return parser


def _number_headings(tokens: Sequence[Token]) -> list[tuple[str, str, str]]:
  """Give every heading an id; return (tag, id, text as HTML) of each."""
  headings: list[tuple[str, str, str]] = []
  for i, token in enumerate(tokens):
    if token.type == 'heading_open':
      text = ''.join(child.content for child in tokens[i + 1].children or ())
      slug = re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-') or 'section'
      anchor = slug if all(slug != other for _, other, _ in headings) else f'{slug}-{i}'
      token.attrSet('id', anchor)
      headings.append((token.tag, anchor, html.escape(text)))
  return headings


def _unwrap_figures(tokens: Sequence[Token]) -> None:
  """Hide the paragraph around an image that stands alone, because a figure may not be inside a paragraph."""
  for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
    if token.type == 'inline' and [child.type for child in token.children or ()] == ['image']:
      before.hidden = after.hidden = True
