"""The samples of a pool while a run goes on, and after it: an SQLite file in which a unit of work is there whole or not at all.

A process may be killed anywhere; the file then holds what was finished before. Only one process at a time may write to it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from polar_jax.runtime import json_files
from polar_jax.synthesis.samples import Failure, PoolPrompt, Request, Sample
from polar_jax.types import UserError

_FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS prompts (
  number INTEGER PRIMARY KEY, id TEXT UNIQUE, digest BLOB UNIQUE, text TEXT, kind TEXT, source TEXT, split TEXT, dropped TEXT);
CREATE TABLE IF NOT EXISTS policies (number INTEGER PRIMARY KEY, name TEXT UNIQUE, identity TEXT);
CREATE TABLE IF NOT EXISTS units (policy INTEGER, shard INTEGER, PRIMARY KEY (policy, shard)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (run INTEGER, policy INTEGER, value TEXT, PRIMARY KEY (run, policy)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samples (
  prompt INTEGER, policy INTEGER, sample INTEGER, text TEXT, ended INTEGER, tokens INTEGER, PRIMARY KEY (prompt, policy, sample)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (prompt INTEGER, policy INTEGER, sample INTEGER, reason TEXT);
"""
_NEXT = 'SELECT COALESCE(MAX(sample) + 1, 0) FROM samples WHERE prompt = ?1 AND policy = ?2'
_AT_ONCE = 1_000  # rows
_PATIENCE = 5.0  # seconds until a file that is in use is given up


class Stored(NamedTuple):
  """A sample as it is stored."""

  prompt: int  # number of the prompt
  policy: str
  sample: int
  text: str
  ended: bool


class StoreError(UserError):
  """The file of samples cannot be used. The message is one line for the user."""


class Store:
  """The file of samples. Its methods may be called from several threads.

  Args:
    path: is created if it does not exist.
    settings: JSON values on which prompts and seeds depend: they must be those of the run that made the file.

  Raises:
    StoreError: the file is damaged, in use by another process, or of a run with other settings.
  """

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    self.path, self._lock = path, threading.RLock()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      self._db = sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False, isolation_level=None)
      # Exclusive: two runs in one folder would both sample what is missing. Without WAL, which some network file systems do not support.
      self._db.executescript(f'PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE; {_TABLES} COMMIT;')
    except sqlite3.Error as error:
      raise self._error(error) from error
    self._numbers: dict[str, int] = {}
    for name, value in {'format': _FORMAT, **settings}.items():
      self._check_fact(name, json.dumps(value, sort_keys=True))
    self._numbers = {name: number for number, name in self._all('SELECT number, name FROM policies')}

  def close(self) -> None:
    """Close the file."""
    self._db.close()

  def fact(self, name: str) -> Any:
    """Return a JSON value that `set_fact` stored; None if there is none."""
    found = self._all('SELECT value FROM facts WHERE name = ?', (name,))
    return json.loads(found[0][0]) if found else None

  def set_fact(self, name: str, value: Any) -> None:
    """Store a JSON value by name."""
    self._write('INSERT OR REPLACE INTO facts VALUES (?, ?)', [(name, json.dumps(value))])

  def add_policy(self, name: str, identity: Mapping[str, Any]) -> None:
    """Make a policy known.

    Raises:
      StoreError: the file has samples of a policy of this name that is sampled in another way.
    """
    text = json.dumps(identity, sort_keys=True)
    found = self._all('SELECT identity FROM policies WHERE name = ?', (name,))
    if found and found[0][0] != text:
      old = json.loads(found[0][0])
      changed = sorted(key for key in {*old, *identity} if old.get(key) != identity.get(key))
      shown = ', '.join(f'{key} was {old.get(key)!r:.40} and is {identity.get(key)!r:.40}' for key in changed[:3])
      raise StoreError(
        f'{self.path}: has samples of policy {name!r} with other settings ({shown}); give the changed policy another name, or remove the '
        'file to sample everything again'
      )
    if not found:
      self._write('INSERT INTO policies (name, identity) VALUES (?, ?)', [(name, text)])
      self._numbers[name] = self._all('SELECT number FROM policies WHERE name = ?', (name,))[0][0]

  def add_prompts(self, prompts: Iterable[tuple[str | None, str, str, str]], split_of: Any) -> dict[str, int]:
    """Add prompts that are not there yet, in their order, in one transaction.

    Args:
      prompts: (its own id or None, text, kind, source). A text that is there already is left out.
      split_of: id -> split.

    Returns:
      Counts: `read`, `added`.
    """
    read = added = 0
    with self.transaction():
      for given, text, kind, source in prompts:
        read += 1
        added += self._add_prompt(given, text, kind, source, split_of)[1]
    return {'read': read, 'added': added}

  def _add_prompt(self, given: str | None, text: str, kind: str, source: str, split_of: Any) -> tuple[int, bool]:
    """Return the number of a prompt, and whether it is new."""
    digest = hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()[:16]
    found = self._db.execute('SELECT number FROM prompts WHERE digest = ?', (digest,)).fetchone()
    if found:
      return found[0], False
    names = [digest.hex()] if given is None else [given, f'{source}:{given}', digest.hex()]
    taken = lambda name: self._db.execute('SELECT 1 FROM prompts WHERE id = ?', (name,)).fetchone()
    name = next((name for name in names if not taken(name)), digest.hex())
    number = self._db.execute('SELECT COALESCE(MAX(number) + 1, 0) FROM prompts').fetchone()[0]
    self._db.execute('INSERT INTO prompts VALUES (?, ?, ?, ?, ?, ?, ?, NULL)', (number, name, digest, text, kind, source, split_of(name)))
    return number, True

  def add_recorded(self, rows: Iterable[tuple[str, str | None, str, str, str]], kind: str, split_of: Any) -> dict[str, int]:
    """Add recorded answers with their prompts, in one transaction. Answers of one policy to one prompt are numbered in their order.

    Args:
      rows: (policy, id of the prompt or None, prompt, response, source).
      kind: of the prompts.
      split_of: id -> split.

    Returns:
      Number of answers by policy.
    """
    counts: dict[str, int] = {}
    with self.transaction():
      for policy, given, text, response, source in rows:
        if policy not in self._numbers:
          self.add_policy(policy, {'kind': 'recorded'})
        number, prompt = self._numbers[policy], self._add_prompt(given, text, kind, source, split_of)[0]
        self._db.execute(f'INSERT INTO samples VALUES (?1, ?2, ({_NEXT}), ?3, 1, 0)', (prompt, number, response))
        counts[policy] = counts.get(policy, 0) + 1
    return counts

  def num_prompts(self) -> int:
    """Return the number of prompts, those included that were dropped."""
    return self._all('SELECT COALESCE(MAX(number) + 1, 0) FROM prompts')[0][0]

  def prompts(self, low: int = 0, high: int | None = None) -> list[PoolPrompt]:
    """Return the prompts low <= number < high that were not dropped."""
    high = self.num_prompts() if high is None else high
    rows = self._all(
      'SELECT id, text, kind, source, number, split FROM prompts WHERE number >= ? AND number < ? AND dropped IS NULL ORDER BY number',
      (low, high),
    )
    return [PoolPrompt(*row) for row in rows]

  def all_prompts(self) -> Iterator[PoolPrompt]:
    """Yield the prompts that were not dropped, in their order."""
    for low in range(0, self.num_prompts(), _AT_ONCE):
      yield from self.prompts(low, low + _AT_ONCE)

  def drop_prompts(self, numbers: Iterable[int], reason: str) -> None:
    """Leave prompts out from now on."""
    self._write('UPDATE prompts SET dropped = ? WHERE number = ?', [(reason, number) for number in numbers])

  def keep_prompts(self, reason: str) -> None:
    """Take back what `drop_prompts` did for a reason."""
    self._write('UPDATE prompts SET dropped = NULL WHERE dropped = ?', [(reason,)])

  def count_prompts(self, column: str) -> dict[str, int]:
    """Return the number of prompts by `kind`, `source`, `split` or, for the others, by the reason why they were `dropped`."""
    kept = 'dropped IS NOT NULL' if column == 'dropped' else 'dropped IS NULL'
    return dict(self._all(f'SELECT {column}, COUNT(*) FROM prompts WHERE {kept} GROUP BY {column} ORDER BY {column}'))

  def count_prompts_by_file(self) -> dict[str, dict[str, int]]:
    """Return the number of prompts that were not dropped, by source and split."""
    out: dict[str, dict[str, int]] = {}
    statement = 'SELECT source, split, COUNT(*) FROM prompts WHERE dropped IS NULL GROUP BY source, split ORDER BY source, split'
    for source, split, count in self._all(statement):
      out.setdefault(source, {})[split] = count
    return out

  def has_pairs(self, groups: Iterable[Sequence[str]]) -> bool:
    """Return whether some prompt that was not dropped has two samples of one of some groups of policies."""
    for names in groups:
      marks = ', '.join('?' * len(names))
      found = self._all(
        f'SELECT 1 FROM samples JOIN prompts ON prompt = number WHERE dropped IS NULL AND policy IN ({marks}) GROUP BY prompt '
        'HAVING COUNT(*) > 1 LIMIT 1',
        [self._numbers[name] for name in names],
      )
      if found:
        return True
    return False

  def done_units(self, policy: str) -> set[int]:
    """Return the numbers of the units of a policy that are finished."""
    return {shard for (shard,) in self._all('SELECT shard FROM units WHERE policy = ?', (self._numbers.get(policy, -1),))}

  def start_run(self) -> int:
    """Return a number for the counts of this process."""
    number = int(self.fact('runs') or 0)
    self.set_fact('runs', number + 1)
    return number

  def finish_unit(
    self,
    policy: str,
    shard: int,
    requests: Sequence[Request],
    results: Sequence[Sample | Failure],
    run: int,
    counts: Mapping[str, int],
  ) -> None:
    """Store the results of a unit and what the policy has cost this run so far, all or nothing."""
    number = self._numbers[policy]
    with self.transaction():
      for request, result in zip(requests, results, strict=True):
        key = (request.prompt.index, number, request.sample)
        if isinstance(result, Failure):
          self._db.execute('INSERT INTO failures VALUES (?, ?, ?, ?)', (*key, result.reason))
        else:
          text = result.text.encode('utf-8', 'replace').decode()  # SQLite stores no lone surrogates
          self._db.execute('INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)', (*key, text, result.ended, result.tokens))
      self._db.execute('INSERT INTO units VALUES (?, ?)', (number, shard))
      self.count(policy, run, counts)

  def count(self, policy: str, run: int, counts: Mapping[str, int]) -> None:
    """Store what a policy has cost this run so far. Costs only grow: of counts that threads store in another order the largest stay."""
    with self.transaction():
      key = (run, self._numbers[policy])
      found = self._all('SELECT value FROM counts WHERE run = ? AND policy = ?', key)
      known = json.loads(found[0][0]) if found else {}
      merged = {name: max(value, known.get(name, 0)) for name, value in counts.items()}
      self._write('INSERT OR REPLACE INTO counts VALUES (?, ?, ?)', [(*key, json.dumps(known | merged))])

  def costs(self) -> dict[str, dict[str, int]]:
    """Return the sums over all runs of what each policy has cost: `requests`, `retries`, `prompt_tokens`, `tokens`."""
    out: dict[str, dict[str, int]] = {}
    for name, text in self._all('SELECT name, value FROM counts JOIN policies ON policy = number'):
      sums = out.setdefault(name, {})
      for key, value in json.loads(text).items():
        sums[key] = sums.get(key, 0) + value
    return out

  def sample_counts(self) -> dict[str, int]:
    """Return the number of samples by policy, of prompts that were not dropped."""
    return dict(
      self._all(
        'SELECT name, COUNT(*) FROM samples s JOIN policies p ON s.policy = p.number JOIN prompts q ON s.prompt = q.number '
        'WHERE dropped IS NULL GROUP BY name ORDER BY name'
      )
    )

  def failure_counts(self) -> dict[str, int]:
    """Return the number of requests without an answer by policy."""
    return dict(self._all('SELECT name, COUNT(*) FROM failures JOIN policies ON policy = number GROUP BY name ORDER BY name'))

  def state(self, without: Sequence[str]) -> list[Any]:
    """Return JSON values that differ if the samples, the prompts, or what they have cost do; no sample is read.

    Args:
      without: names of facts that do not count.
    """
    facts = [row for row in self._all('SELECT name, value FROM facts ORDER BY name') if row[0] not in (*without, 'runs')]
    units = self._all('SELECT name, COUNT(*), SUM(shard) FROM units JOIN policies ON policy = number GROUP BY name ORDER BY name')
    return [facts, units, self.count_prompts('split'), self.count_prompts('dropped'), self.costs()]

  def samples(self, low: int, high: int, split: str) -> list[Stored]:
    """Return the samples of the prompts of a split low <= number < high that were not dropped, by prompt, policy and number."""
    names = {number: name for name, number in self._numbers.items()}
    rows = self._all(
      # CROSS JOIN: the prompts are looked at first, so that no sample of another split is read.
      'SELECT prompt, policy, sample, s.text, ended FROM prompts CROSS JOIN samples s ON prompt = number '
      'WHERE number >= ? AND number < ? AND split = ? AND dropped IS NULL ORDER BY number, policy, sample',
      (low, high, split),
    )
    return [Stored(prompt, names[policy], sample, text, bool(ended)) for prompt, policy, sample, text, ended in rows]

  def _check_fact(self, name: str, value: str) -> None:
    found = self._all('SELECT value FROM facts WHERE name = ?', (name,))
    if found and found[0][0] != value:
      raise StoreError(
        f'{self.path}: has samples of a run with another {name} ({found[0][0]:.60}, now {value:.60}); continue with the old setting, name '
        'another workdir, or remove the file to sample everything again'
      )
    if not found:
      self._write('INSERT INTO facts VALUES (?, ?)', [(name, value)])

  def _all(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
    try:
      with self._lock:
        return self._db.execute(statement, values).fetchall()
    except sqlite3.Error as error:
      raise self._error(error) from error

  def _write(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
    with self.transaction():
      self._db.executemany(statement, rows)

  def transaction(self) -> _Transaction:
    """Return a context in which all changes happen, or none if an error leaves it."""
    return _Transaction(self, self._db, self._lock)

  def _error(self, error: Exception) -> StoreError:
    text = json_files.shorten(error)
    if 'locked' in text:
      return StoreError(f'{self.path}: is in use by another process; wait for it, or stop it')
    if 'full' in text or 'readonly' in text or 'unable to open' in text:
      return StoreError(f'{self.path}: cannot be written ({text}); free some space, or name another workdir')
    return StoreError(f'{self.path}: not a readable file of samples ({text}); remove it to sample everything again')


class _Transaction:
  """A context in which changes happen all or not at all. Contexts may be nested: the outermost counts."""

  def __init__(self, store: Store, db: sqlite3.Connection, lock: threading.RLock):
    self._store, self._db, self._lock = store, db, lock

  def __enter__(self) -> None:
    self._lock.acquire()
    self._outer = not self._db.in_transaction
    if self._outer:
      self._db.execute('BEGIN')

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    try:
      if self._outer:
        self._db.execute('COMMIT' if error is None else 'ROLLBACK')
    except sqlite3.Error as failed:
      raise self._store._error(failed) from failed
    finally:
      self._lock.release()
    if isinstance(error, sqlite3.Error):
      raise self._store._error(error) from error
