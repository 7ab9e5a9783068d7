"""English and code that every CPython ships, so that the tiny world needs no download.

Four corpora differ in vocabulary and form: the language reference, docstrings, comments, and bare code. Sources are read as text and
parsed; no module of the library but `pydoc_data.topics` (plain data) is ever imported.
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
MAX_CHARACTERS = 600_000  # of a corpus
_FILE_CHARACTERS = 60_000  # longer files are skipped: parsing them costs more than their share of a corpus is worth
_PACKAGE_CHARACTERS = 60_000  # of source read from one package or top-level module
_EXCLUDED = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'encodings', 'pydoc_data', 'turtledemo'}
_SECTION_CHARACTERS = 800  # documents are cut near this length so that the split into parts is fine grained
_MIN_CHARACTERS = {'reference': 80, 'docstrings': 40, 'comments': 40, 'source': 80}


class CorpusError(UserError):
  """This Python lacks a file that the corpora are made of."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of one kind, in a fixed order, without duplicates, ASCII only."""

  name: str
  documents: tuple[str, ...]

  def part(self, part: str) -> list[str]:
    """The documents of 'train', 'prompts' or 'unseen'; the three are disjoint and cover the corpus."""
    return [d for d in self.documents if part_of(d) == part]


def part_of(document: str) -> str:
  """'train' (80%), 'prompts' (10%) or 'unseen' (10%), by a hash of the text alone: the same text never lands in two parts."""
  bucket = int.from_bytes(hashlib.sha256(document.encode()).digest()[:4], 'big') % 10
  return PARTS[max(0, bucket - 7)]


def load_corpora(max_characters: int = MAX_CHARACTERS) -> list[Corpus]:
  """Reads the four corpora of this Python, each at most `max_characters` long.

  Raises:
    CorpusError: naming the package or folder that this Python lacks.
  """
  by_package: dict[str, dict[str, list[str]]] = {name: {} for name in CORPUS_NAMES}
  by_package['reference'] = _reference_topics()
  for package, text in _library_sources():
    for name, found in _split_source(text).items():
      by_package[name].setdefault(package, []).extend(found)
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
  """(package, text) of the library's files in sorted order, no package contributing more than its share."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  paths = sorted(p for p in root.rglob('*.py') if not _EXCLUDED.intersection(p.relative_to(root).parts[:-1]))
  paths = [p for p in paths if not p.name.startswith('_sysconfigdata')]
  if not paths:
    raise CorpusError(f'the standard library folder {root} holds no .py files; use a full CPython installation')
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
  """Docstrings, comment blocks and bare code of one file; empty for a file written for another version of Python."""
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
  # a blanked line and the author's own are alike: one empty line at most
  code = re.sub(r'\n\s*\n(\s*\n)+', '\n\n', '\n'.join(lines)).strip('\n')
  return {'docstrings': docstrings, 'comments': ['\n'.join(b) for b in blocks], 'source': [code]}


def _sections(document: str) -> list[str]:
  """Cuts a document at blank lines into pieces of about `_SECTION_CHARACTERS`."""
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
  """Sections of every package up to one common allowance, the largest that keeps the corpus under `max_characters`."""
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
  left, allowance = max_characters, max_characters
  for i, size in enumerate(sizes):
    share = left // (len(sizes) - i)
    if size > share:
      allowance = share
      break
    left -= size
  documents = []
  for package in pieces:
    total = 0
    for section in pieces[package]:
      if total + len(section) <= allowance:
        documents.append(section)
        total += len(section)
  return documents
