"""English text and code that every CPython ships, so that the miniature needs no download.

Four corpora differ in vocabulary and form: the language reference, docstrings, comments, and bare code. Sources are read as text and
parsed; the only module of the library that is imported is `pydoc_data.topics` (plain data).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import inspect
import io
import pathlib
import re
import sysconfig
import textwrap
import tokenize

from polar_jax.types import UserError

CORPUS_NAMES = ('reference', 'docstrings', 'comments', 'source')
PARTS = ('train', 'prompts', 'unseen')
MAX_CHARACTERS = 600_000  # per corpus
_FILE_CHARACTERS = 60_000  # longer files are skipped: too slow to parse for the text they add
_PACKAGE_CHARACTERS = 60_000  # source read per package or top-level module
_EXCLUDED = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'encodings', 'pydoc_data', 'turtledemo'}
_SECTION_CHARACTERS = 800  # documents are cut at about this length so that the split into parts is fine-grained
_MIN_CHARACTERS = {'reference': 80, 'docstrings': 40, 'comments': 40, 'source': 80}


class CorpusError(UserError):
  """This Python lacks a file that the corpora are built from."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """ASCII documents of one kind in a fixed order, without duplicates."""

  name: str
  documents: tuple[str, ...]

  def part(self, part: str) -> list[str]:
    """Return the documents of 'train', 'prompts' or 'unseen'; the three parts are disjoint and cover the corpus."""
    return [d for d in self.documents if part_of(d) == part]


def part_of(document: str) -> str:
  """Return 'train' (80%), 'prompts' (10%) or 'unseen' (10%), by a hash of the text alone: the same text is never in two parts."""
  bucket = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], 'big') % 10
  return PARTS[max(0, bucket - 7)]


def load_corpora(max_characters: int = MAX_CHARACTERS) -> list[Corpus]:
  """Read the four corpora of this Python, each at most `max_characters` long.

  Raises:
    CorpusError: this Python lacks a package or folder; the message names it.
  """
  by_package: dict[str, dict[str, list[str]]] = {name: {} for name in CORPUS_NAMES}
  by_package['reference'] = _reference_topics()
  for package, text in _library_sources():
    for name, pieces in _split_source(text).items():
      by_package[name].setdefault(package, []).extend(pieces)
  corpora = []
  for name in CORPUS_NAMES:
    documents = _balanced(by_package[name], max_characters, _MIN_CHARACTERS[name])
    if not documents:
      raise CorpusError(f'the standard library of this Python yields no text for corpus {name!r}; use a full CPython installation')
    corpora.append(Corpus(name, tuple(documents)))
  return corpora


def _reference_topics() -> dict[str, list[str]]:
  if importlib.util.find_spec('pydoc_data') is None or importlib.util.find_spec('pydoc_data.topics') is None:
    raise CorpusError('this Python lacks the package pydoc_data.topics (the language reference); use a full CPython installation')
  from pydoc_data import topics

  return {key: [textwrap.dedent(topics.topics[key])] for key in sorted(topics.topics)}


def _library_sources() -> list[tuple[str, str]]:
  """Return (package, text) of the library's files in sorted order, with a limit on the source of each package."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  paths = sorted(p for p in root.rglob('*.py') if not _EXCLUDED.intersection(p.relative_to(root).parts[:-1]))
  paths = [p for p in paths if not p.name.startswith('_sysconfigdata')]
  if not paths:
    raise CorpusError(f'the standard library folder {root} has no .py files; use a full CPython installation')
  taken: dict[str, int] = {}
  sources = []
  for path in paths:
    package = path.relative_to(root).parts[0]
    size = path.stat().st_size
    if size > _FILE_CHARACTERS or taken.get(package, 0) + size > _PACKAGE_CHARACTERS:
      continue
    taken[package] = taken.get(package, 0) + size
    sources.append((package, path.read_text(encoding='utf-8', errors='replace')))
  return sources


def _split_source(text: str) -> dict[str, list[str]]:
  """Split a file into docstrings, comment blocks and bare code; return {} for a file that this version of Python cannot parse."""
  try:
    tree = ast.parse(text)
    comments = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
  except (SyntaxError, ValueError, tokenize.TokenError):
    return {}
  lines = text.splitlines()
  docstrings = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
      continue
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
      docstrings.append(inspect.cleandoc(first.value.value))
      for line in range(first.lineno - 1, min(first.end_lineno or first.lineno, len(lines))):
        lines[line] = ''
  blocks: list[list[str]] = []
  previous = -2
  for token in comments:
    row, column = token.start
    if row > len(lines):
      continue
    lines[row - 1] = lines[row - 1][:column].rstrip()
    if row != previous + 1:
      blocks.append([])
    blocks[-1].append(token.string.lstrip('#!').strip())
    previous = row
  # collapse blank lines, whether the author's or left by removed text
  code = re.sub(r'\n\s*\n(\s*\n)+', '\n\n', '\n'.join(lines)).strip('\n')
  return {'docstrings': docstrings, 'comments': ['\n'.join(b) for b in blocks], 'source': [code]}


def _sections(document: str) -> list[str]:
  """Cut a document at blank lines into pieces of about `_SECTION_CHARACTERS`."""
  text = document.replace('\t', '    ').encode('ascii', 'ignore').decode()
  text = re.sub(r'[^\n -~]', '', text)
  sections, current = [], ''
  for paragraph in re.split(r'\n{2,}', text):
    if not paragraph.strip():
      continue
    if current and len(current) + len(paragraph) > _SECTION_CHARACTERS:
      sections.append(current)
      current = ''
    current = f'{current}\n\n{paragraph}' if current else paragraph
  return [s.strip('\n') for s in [*sections, current] if s.strip()]


def _balanced(by_package: dict[str, list[str]], max_characters: int, min_characters: int) -> list[str]:
  """Return sections of every package up to a common limit, the largest that keeps the corpus under `max_characters`."""
  seen: set[str] = set()
  pieces: dict[str, list[str]] = {}
  for package in sorted(by_package):
    kept = pieces.setdefault(package, [])
    for document in by_package[package]:
      for section in _sections(document):
        if len(section) >= min_characters and section not in seen:
          seen.add(section)
          kept.append(section)
  sizes = sorted(sum(map(len, p)) for p in pieces.values())
  left, limit = max_characters, max_characters
  for i, size in enumerate(sizes):
    share = left // (len(sizes) - i)
    if size > share:
      limit = share
      break
    left -= size
  documents = []
  for package in pieces:
    total = 0
    for section in pieces[package]:
      if total + len(section) <= limit:
        documents.append(section)
        total += len(section)
  return documents
