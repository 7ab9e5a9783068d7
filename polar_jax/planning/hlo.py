"""Collectives and HBM traffic of a compiled program, read from its text. Loops count by their trip counts."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_GROUPS = re.compile(r'replica_groups=(\[[\d,]+\]<=\S+|\{\{[\d,]*\}|mesh\[[^\]]*\] \{[^}]*\})')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'%([\w.\-]+)')
_BITS = re.compile(r'[a-z]+(\d+)')
# Instructions that move nothing, or whose traffic is counted elsewhere.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all', 'partition-id'}


class Instruction(NamedTuple):
  """One instruction of a computation."""

  name: str
  type: str
  opcode: str
  arguments: str  # between its parentheses
  attributes: str  # after them

  @property
  def operands(self) -> list[str]:
    """Names of the operands."""
    return _NAME.findall(self.arguments)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Traffic of one device in one call of the program.

  Attributes:
    count: number of collectives of each kind.
    size: bytes of their larger side (input or output).
    sent: bytes that a device sends with ring algorithms: (g - 1) / g of the larger side in a group of g, twice that for an all-reduce.
    hbm: bytes read from and written to HBM. An array that a fusion slices counts as the slice.
  """

  count: dict[str, float]
  size: dict[str, float]
  sent: dict[str, float]
  hbm: float


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Return (instructions of each computation, name of the entry computation).

  Raises:
    ValueError: `text` is not compiled HLO.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and ' = ' in line:
      current.append(_instruction(line))
  if not entry:
    raise ValueError('the text is not a compiled program: it has no ENTRY')
  return computations, entry


def _instruction(line: str) -> Instruction:
  name, rest = line.strip().removeprefix('ROOT ').split(' = ', 1)
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, at = rest[: rest.index('(')], rest.index('(')
  close = _closing(rest, at)
  return Instruction(name.lstrip('%'), kind, opcode, rest[at + 1 : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  raise ValueError(f'unbalanced parentheses: {text[:80]}')


def _sizes(kind: str, hbm_only: bool = False) -> list[int]:
  """Return the bytes of each array of a type. With `hbm_only`, arrays in on-chip memory (a layout with S(1)) count 0."""
  sizes = []
  for dtype, shape, layout in _ARRAY.findall(kind):
    bits = 8 if dtype == 'pred' else int(_BITS.match(dtype)[1]) if _BITS.match(dtype) else 0  # type: ignore[index]
    size = math.prod(int(n) for n in shape.split(',') if n) * bits // 8
    sizes.append(0 if hbm_only and 'S(' in layout else size)
  return sizes


def traffic(text: str) -> Traffic:
  """Return the traffic of a compiled program.

  Args:
    text: of the program (`jax.stages.Compiled.as_text`).

  Raises:
    ValueError: `text` is not compiled HLO.
  """
  computations, entry = parse(text)
  totals = Traffic(collections.defaultdict(float), collections.defaultdict(float), collections.defaultdict(float), 0.0)
  hbm = _Walk(computations, totals).computation(entry, 1.0)
  return Traffic(dict(totals.count), dict(totals.size), dict(totals.sent), hbm)


class _Walk:
  """A walk through the computations of a program that adds up their traffic."""

  def __init__(self, computations: dict[str, list[Instruction]], into: Traffic):
    self._computations, self._into = computations, into
    self._seen = set[tuple[str, str]]()  # (computation, channel) of collectives

  def computation(self, name: str, times: float, fused_in: str | None = None) -> float:
    """Add the collectives of a computation to the totals and return its HBM bytes.

    Args:
      name: of the computation.
      times: how often it runs.
      fused_in: the computation that it is fused into, if any; its HBM traffic is that of the fusion.
    """
    hbm: float = 0.0
    instructions = self._computations[name]
    by_name = {i.name: i for i in instructions}
    for i in instructions:
      kind = i.opcode.removesuffix('-start')
      if kind in COLLECTIVES:
        self._collective(i, kind, name, by_name, times, fused_in or name)
      trips = times * (self._trips(i) if i.opcode == 'while' else 1)
      inside = None if i.opcode in ('while', 'conditional', 'call', 'async-start') else name
      for called in self._called(i):
        hbm += self.computation(called, trips, fused_in or inside)
      if not fused_in:
        hbm += times * self._moved(i, by_name)
    return hbm

  def _called(self, i: Instruction) -> list[str]:
    names = _CALLED.findall(i.attributes)
    for group in _BRANCHES.findall(i.attributes):
      names += _NAME.findall(group)
    return [name for name in names if name in self._computations]

  def _trips(self, loop: Instruction) -> float:
    known = _TRIPS.search(loop.attributes)
    if known:
      return float(known[1])
    condition = re.search(r'condition=%?([\w.\-]+)', loop.attributes)
    instructions = self._computations[condition[1]] if condition else []
    # A scan counts from 0 up to a constant.
    compared = [i for i in instructions if i.opcode == 'compare' and 'direction=LT' in i.attributes]
    constants = {i.name: i for i in instructions if i.opcode == 'constant'}
    limits = [name for i in compared for name in i.operands if name in constants]
    if len(compared) == 1 and len(limits) == 1:
      return float(constants[limits[0]].arguments)
    return 1.0  # the trip count depends on data: counted once

  def _collective(self, i: Instruction, kind: str, computation: str, by_name: dict[str, Instruction], times: float, runs_in: str) -> None:
    channel = re.search(r'channel_id=(\d+)', i.attributes)
    if channel:
      # On TPUs a collective is spread over the fusions that it overlaps with: its start, its end and each part repeat the channel.
      if (runs_in, channel[1]) in self._seen:
        return
      self._seen.add((runs_in, channel[1]))
    result = _sizes(i.type)
    inputs = [size for name in i.operands if name in by_name for size in _sizes(by_name[name].type)]
    size = max(max(result), max(inputs, default=0)) if i.opcode.endswith('-start') else max(sum(result), sum(inputs))
    group = _group(i.attributes)
    if kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):  # the form that the TPU compiler emits
      kind = 'reduce-scatter'
    share = 1.0 if kind == 'collective-permute' else (group - 1) / group * (2 if kind == 'all-reduce' else 1)
    for totals, value in ((self._into.count, 1), (self._into.size, size), (self._into.sent, size * share)):
      totals[kind] += times * value

  def _moved(self, i: Instruction, by_name: dict[str, Instruction]) -> float:
    """Return the bytes of HBM that an instruction reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith('-done'):
      return 0.0
    if i.opcode in ('dynamic-slice', 'slice', 'gather'):
      return 2.0 * sum(_sizes(i.type, True))
    if i.opcode == 'dynamic-update-slice':
      return 2.0 * sum(_sizes(by_name[i.operands[1]].type, True)) if i.operands[1] in by_name else 0.0
    if i.opcode.endswith('-start'):  # its results include the operands
      return float(sum(_sizes(i.type, True)))
    operands = [by_name[name] for name in i.operands if name in by_name]
    if i.opcode == 'fusion':
      return self._fusion(i, operands)
    return float(sum(_sizes(i.type, True)) + sum(size for o in operands for size in _sizes(o.type, True)))

  def _fusion(self, i: Instruction, operands: list[Instruction]) -> float:
    """Return the HBM bytes of a fusion, which touches only a part of the arrays that it slices or updates."""
    inside = self._computations[self._called(i)[0]]
    parameters = sorted((p for p in inside if p.opcode == 'parameter'), key=lambda p: int(p.arguments))
    moved: float = 0.0
    updated: float = 0.0
    for parameter, operand in zip(parameters, operands, strict=False):
      size = float(sum(_sizes(operand.type, True)))
      uses = [u for u in inside if parameter.name in u.operands]
      if size and uses and all(u.opcode in ('dynamic-slice', 'slice', 'gather') and u.operands[0] == parameter.name for u in uses):
        size = min(size, float(sum(sum(_sizes(u.type)) for u in uses)))
      elif size and uses and all(u.opcode == 'dynamic-update-slice' and u.operands[0] == parameter.name for u in uses):
        by_name = {u.name: u for u in inside}
        part = float(sum(sum(_sizes(by_name[u.operands[1]].type)) for u in uses))
        updated += size - part
        size = 0.0
      moved += size
    return moved + max(sum(_sizes(i.type, True)) - updated, 0.0)


def _group(attributes: str) -> int:
  """Return the number of devices in a group of a collective."""
  groups = _GROUPS.search(attributes)
  if not groups:
    return 2  # a permutation lists pairs
  text = groups[1]
  if text.startswith('{{'):
    return text.count(',') + 1
  if text.startswith('['):
    return int(text[1 : text.index(']')].split(',')[-1])
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", text))
  return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", text[text.index(']') :]))
