"""The file that describes a pool of policies: which language models there are, how each is sampled, and what each is near to."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from polar_jax.config import ConfigError
from polar_jax.runtime import json_files, text_files
from polar_jax.synthesis.samples import INSTRUCTION, PREFIX
from polar_jax.types import UserError

_ANY = 'any'
_PROMPTS = (PREFIX, INSTRUCTION, _ANY)
_MAX_NAME = 200  # characters

# Settings of each kind in addition to those of every policy.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
  'checkpoint': ('path',),
  'openai': ('base_url', 'model'),
  'recorded': ('path',),
  'ngram': ('path',),
  'vllm': ('model',),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
  'checkpoint': ('chat', 'system', 'layers', 'bits', 'max_length', 'batch_size'),
  'openai': ('chat', 'system', 'api_key_env'),
  'recorded': ('policy', 'merge'),
  'ngram': ('order', 'window', 'strength', 'vocab_size'),
  'vllm': ('chat', 'system', 'engine'),
}
KINDS = tuple(_REQUIRED)
_SAMPLING = ('temperature', 'top_p', 'top_k', 'max_tokens')
_COMMON = ('name', 'kind', 'weight', 'family', 'size', 'date', 'held_out', 'near_to', 'prompts')


@dataclasses.dataclass(frozen=True)
class PolicySpec:
  """A policy of a pool.

  Attributes:
    name: is unique in the pool.
    kind: one of KINDS.
    weight: how often the policy is drawn, relative to the others.
    temperature: of sampling, above 0.
    top_p: of nucleus sampling.
    top_k: sample from this many likeliest tokens; None: from all.
    max_tokens: most tokens of an answer.
    family: such as 'qwen2.5'; the category of its triplets.
    size: parameters, in billions.
    date: of the weights, as YYYY-MM-DD or a part of it from the left.
    held_out: kept for the split of unseen policies.
    near_to: names of policies that are hard to tell from this one: an earlier checkpoint, another quantization.
    prompts: which kind of prompts it answers: 'prefix', 'instruction', 'any', or None: those that suit it.
    settings: of its kind.
  """

  name: str
  kind: str
  weight: float = 1.0
  temperature: float = 1.0
  top_p: float = 0.9
  top_k: int | None = None
  max_tokens: int = 256
  family: str = ''
  size: float | None = None
  date: str | None = None
  held_out: bool = False
  near_to: tuple[str, ...] = ()
  prompts: str | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def identity(self) -> dict[str, Any]:
    """Return, as JSON values, everything that decides its samples: not where a server runs, nor how often the policy is drawn."""
    values = {name: value for name, value in self.settings.items() if name not in ('base_url', 'api_key_env', 'batch_size')}
    return {'kind': self.kind, **{name: getattr(self, name) for name in _SAMPLING}, **values}

  def accepts(self, kind: str, kinds: Sequence[str]) -> bool:
    """Return whether it answers prompts of a kind.

    Args:
      kind: of the prompt.
      kinds: of all prompts of the run. A policy without its own kind of prompts answers the others.
    """
    own = self.prompts
    if own is None:
      chat = self.settings.get('chat')
      own = _ANY if chat is None and self.kind in ('openai', 'recorded') else INSTRUCTION if chat else PREFIX
      own = own if own in kinds else _ANY
    return own in (kind, _ANY)


def read_pool(path: pathlib.Path) -> list[PolicySpec]:
  """Read a pool: a .json or .yaml file, or a .py file with a function `get_pool`.

  It is a list of policies, or an object of `policies` and `defaults`, which are settings of every policy that has no other. Paths in it
  are relative to the file.

  Raises:
    ConfigError: the file or an entry of it cannot be used; the message names both.
  """
  value = _read(path)
  value = {'policies': value} if isinstance(value, list) else value
  if not isinstance(value, Mapping) or not isinstance(value.get('policies'), list):
    raise ConfigError(f'{path}: a pool is a list of policies, or an object with the keys policies (a list) and defaults')
  if unknown := sorted(map(str, set(value) - {'policies', 'defaults'})):
    raise ConfigError(f'{path}: unknown key {", ".join(unknown)}; known: policies, defaults')
  defaults, entries = value.get('defaults') or {}, value['policies']
  if not isinstance(defaults, Mapping) or (bad := sorted(map(str, set(defaults) - set(_SAMPLING) - {'prompts', 'weight'}))):
    raise ConfigError(f'{path}: defaults may hold {", ".join(_SAMPLING)}, prompts and weight' + (f', not {", ".join(bad)}' if bad else ''))
  if not entries:
    raise ConfigError(f'{path}: the pool has no policies')
  specs = [_spec(path, number, entry, defaults) for number, entry in enumerate(entries, 1)]
  check_names(path, specs)
  return specs


def check_names(path: pathlib.Path, specs: Sequence[PolicySpec]) -> None:
  """Check that names are unique, and what they say about each other.

  Raises:
    ConfigError: two policies have one name, `near_to` names no policy, or a policy for evaluation is near to one for training.
  """
  by_name: dict[str, PolicySpec] = {}
  for spec in specs:
    if spec.name in by_name:
      raise ConfigError(f'{path}: two policies have the name {spec.name!r}; give each its own')
    by_name[spec.name] = spec
  for spec in specs:
    for near in spec.near_to:
      other = by_name.get(near)
      if other is None or other is spec:
        raise ConfigError(f'{path}: policy {spec.name!r}: near_to names {near!r}, which is not another policy of the pool')
      if other.held_out != spec.held_out:
        raise ConfigError(
          f'{path}: policy {spec.name!r} is near to {near!r}, but only one of them is held out; hold out both or none, because a '
          'policy that is nearly known is not unseen'
        )


def _read(path: pathlib.Path) -> Any:
  if not path.is_file():
    raise ConfigError(f'synthesize.pool: no file at {path}')
  if path.suffix == '.json':
    try:
      return json_files.parse(text_files.read_text(path))
    except (UserError, OSError) as error:
      raise ConfigError(f'{path}: {json_files.shorten(error)}; correct the file') from error
  if path.suffix in ('.yaml', '.yml'):
    try:
      return yaml.safe_load(text_files.read_text(path))
    except (yaml.YAMLError, UserError, OSError, ValueError, RecursionError) as error:
      raise ConfigError(f'{path}: not YAML ({json_files.shorten(error)}); correct the file') from error
  if path.suffix == '.py':
    try:
      return runpy.run_path(str(path))['get_pool']()
    except KeyError as error:
      raise ConfigError(f'{path}: has no function get_pool, which returns the pool') from error
    except Exception as error:
      raise ConfigError(f'{path}: get_pool failed ({type(error).__name__}: {json_files.shorten(error)})') from error
  raise ConfigError(f'{path}: unknown kind of file; a pool is a .json, .yaml or .py file')


def _spec(path: pathlib.Path, number: int, entry: Any, defaults: Mapping[str, Any]) -> PolicySpec:
  """Return the policy of one entry."""
  if not isinstance(entry, Mapping):
    raise ConfigError(f'{path}: policy {number} is {entry!r:.80}; it must be an object')
  name = entry.get('name')
  if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable() or name != name.strip():
    raise ConfigError(f'{path}: policy {number} needs a name of printable characters, at most {_MAX_NAME} (found: {name!r:.60})')
  where = f'{path}: policy {name!r}'
  kind = entry.get('kind')
  if kind not in KINDS:
    raise ConfigError(f'{where}: unknown kind {kind!r:.60}; known: {", ".join(KINDS)}')
  own = (*_REQUIRED[kind], *_OPTIONAL[kind])
  known = (*_COMMON, *own, *(() if kind == 'recorded' else _SAMPLING))
  if unknown := sorted(map(str, set(entry) - set(known))):
    raise ConfigError(f'{where}: unknown setting {", ".join(unknown)}; a policy of kind {kind} has: {", ".join(known)}')
  if missing := [key for key in _REQUIRED[kind] if entry.get(key) in (None, '', [])]:
    raise ConfigError(f'{where}: lacks {", ".join(missing)}, which a policy of kind {kind} needs')
  given = {**{k: v for k, v in defaults.items() if k in known}, **entry}
  return PolicySpec(
    name=name,
    kind=kind,
    weight=_number(where, given, 'weight', 1.0, above=0),
    temperature=_number(where, given, 'temperature', 1.0, above=0),
    top_p=_number(where, given, 'top_p', 0.9, above=0, most=1),
    top_k=_whole(where, given, 'top_k', None),
    max_tokens=_whole(where, given, 'max_tokens', 256) or 256,
    family=_text(where, given, 'family') or '',
    size=None if given.get('size') is None else _number(where, given, 'size', 0.0, above=0),
    date=_date(where, given.get('date')),
    held_out=_flag(where, given, 'held_out') or False,
    near_to=_names(where, given.get('near_to')),
    prompts=_choice(where, given, 'prompts', _PROMPTS),
    settings=_settings(path, where, given, own),
  )


def _settings(path: pathlib.Path, where: str, given: Mapping[str, Any], own: Sequence[str]) -> dict[str, Any]:
  """Return the checked settings of a policy's kind."""
  out: dict[str, Any] = {}
  for key in own:
    value = given.get(key)
    if value is None:
      continue
    match key:
      case 'path':
        several = isinstance(value, list) and given['kind'] != 'checkpoint'
        found = [_located(path, _required_text(where, key, one)) for one in (value if several else [value])]
        out[key] = found[0] if given['kind'] == 'checkpoint' else found
      case 'policy':
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
          raise ConfigError(f'{where}: policy is {value!r:.60}; it must be the name of a policy of the file, a pattern, or a list of them')
        out[key] = patterns
      case 'base_url':
        urls = [value] if isinstance(value, str) else value
        if not isinstance(urls, list) or not all(isinstance(url, str) and re.match(r'https?://[^/\s]', url) for url in urls):
          raise ConfigError(
            f'{where}: base_url is {value!r:.80}; it must be an address such as http://localhost:8000/v1, or a list of them'
          )
        out[key] = urls
      case 'chat' | 'merge':
        out[key] = _flag(where, given, key)
      case 'layers' | 'bits' | 'order' | 'vocab_size' | 'max_length' | 'batch_size':
        out[key] = _whole(where, given, key, None)
      case 'strength':
        out[key] = _number(where, given, key, 0.0, least=0)
      case 'window':
        if not isinstance(value, list) or len(value) != 2 or not all(_is_number(x) for x in value) or not 0 <= value[0] < value[1] <= 1:
          raise ConfigError(f'{where}: window is {value!r:.60}; it must be [start, end] with 0 <= start < end <= 1, shares of the text')
        out[key] = [float(x) for x in value]
      case 'engine':
        if not isinstance(value, Mapping):
          raise ConfigError(f'{where}: engine is {value!r:.60}; it must be an object of vLLM engine arguments')
        out[key] = dict(value)
      case _:
        out[key] = _required_text(where, key, value)
  if out.get('bits') is not None and not 2 <= out['bits'] <= 8:
    raise ConfigError(f'{where}: bits is {out["bits"]}; it must be from 2 to 8')
  if out.get('order', 1) > 5:
    raise ConfigError(f'{where}: order is {out["order"]}; it must be at most 5')
  if 'system' in out and out.get('chat') is False:
    raise ConfigError(f'{where}: has a system prompt, but chat is false; only conversations have one')
  if 'system' in out:
    out['chat'] = True
  return out


def _located(pool: pathlib.Path, value: str) -> str:
  """Return a path of a pool. Names of buckets stay as they are."""
  local = pathlib.Path(value).expanduser()
  return value if '://' in value else str(local if local.is_absolute() else pool.parent / local)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(
  where: str,
  given: Mapping[str, Any],
  key: str,
  default: float,
  *,
  above: float = -math.inf,
  least: float = -math.inf,
  most: float = math.inf,
) -> float:
  value = given.get(key, default)
  if not _is_number(value) or not (above < value <= most and value >= least):
    bounds = [f'above {above:g}' if above > -math.inf else '', f'at least {least:g}' if least > -math.inf else '']
    bounds.append(f'at most {most:g}' if most < math.inf else '')
    raise ConfigError(f'{where}: {key} is {value!r:.60}; it must be a number {" and ".join(filter(None, bounds))}')
  return float(value)


def _whole(where: str, given: Mapping[str, Any], key: str, default: int | None) -> int | None:
  value = given.get(key, default)
  if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
    raise ConfigError(f'{where}: {key} is {value!r:.60}; it must be a whole number of at least 1')
  return value


def _flag(where: str, given: Mapping[str, Any], key: str) -> bool | None:
  value = given.get(key)
  if value is not None and not isinstance(value, bool):
    raise ConfigError(f'{where}: {key} is {value!r:.60}; it must be true or false')
  return value


def _text(where: str, given: Mapping[str, Any], key: str) -> str | None:
  return None if given.get(key) is None else _required_text(where, key, given[key])


def _required_text(where: str, key: str, value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise ConfigError(f'{where}: {key} is {value!r:.60}; it must be a text')
  return value


def _choice(where: str, given: Mapping[str, Any], key: str, choices: Sequence[str]) -> str | None:
  value = given.get(key)
  if value is not None and value not in choices:
    raise ConfigError(f'{where}: {key} is {value!r:.60}; it must be one of: {", ".join(choices)}')
  return value


def _date(where: str, value: Any) -> str | None:
  text = None if value is None else str(value)  # YAML reads a date as one
  if text is not None and not re.fullmatch(r'\d{4}(-\d\d(-\d\d)?)?', text):
    raise ConfigError(f'{where}: date is {value!r:.60}; it must be YYYY, YYYY-MM or YYYY-MM-DD')
  return text


def _names(where: str, value: Any) -> tuple[str, ...]:
  names = [value] if isinstance(value, str) else value or []
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ConfigError(f'{where}: near_to is {value!r:.60}; it must be the name of a policy, or a list of names')
  return tuple(names)
