"""Traffic of compiled programs, against counts by hand and a program with known collectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from polar_jax.planning import hlo

PROGRAM = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,128}
}

%sliced (p0: f32[100,128], p1: s32[]) -> f32[1,128] {
  %p1 = s32[] parameter(1)
  %p0 = f32[100,128]{1,0} parameter(0)
  %slice = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,128}
  ROOT %negated = f32[1,128]{1,0} negate(%slice)
}

%begun (v: f32[8,128]) -> f32[32,128] {
  %v = f32[8,128]{1,0} parameter(0)
  ROOT %all = f32[32,128]{1,0:T(8,128)S(1)} all-gather(%v), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%ended (v: f32[8,128]) -> f32[32,128] {
  %v = f32[8,128]{1,0} parameter(0)
  ROOT %all.1 = f32[32,128]{1,0:T(8,128)S(1)} all-gather(%v), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[] constant(7)
  %state = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]{1,0}) parameter(0)
  %value = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %gathered = (f32[8,128]{1,0}, f32[16,128]{1,0}) all-gather-start(%value), replica_groups=[2,2]<=[4], dimensions={0}
  %whole = f32[16,128]{1,0} all-gather-done(%gathered)
  %scattered = f32[2,128]{1,0} fusion(%value), kind=kCustom, calls=%all-reduce-scatter
  %chip = f32[8,128]{1,0:S(1)} get-tuple-element(%state), index=2
  %async-collective-start = f32[32,128]{1,0:S(1)} fusion(%chip), kind=kCustom, calls=%begun
  %async-collective-done = f32[32,128]{1,0:S(1)} fusion(%chip), kind=kCustom, calls=%ended
  %onchip = f32[8,128]{1,0:T(8,128)S(1)} copy(%value)
  ROOT %next = (s32[], f32[8,128]{1,0}) tuple(%i, %value)
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %big = f32[100,128]{1,0} parameter(1)
  %row = f32[1,128]{1,0} fusion(%big, %zero), kind=kLoop, calls=%sliced
  %start = (s32[], f32[8,128]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[8,128]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %total = (bf16[64]{0}, bf16[32]{0}) all-reduce(%a, %b), replica_groups=mesh['x'=2,'y'=1,'z'=4] {'x','z'}, to_apply=%add
}
"""


def test_traffic_by_hand():
  traffic = hlo.traffic(PROGRAM)
  assert traffic.count == {'all-gather': 7 + 7, 'reduce-scatter': 7, 'all-reduce': 1}
  assert traffic.size == {'all-gather': 7 * (16 + 32) * 128 * 4, 'reduce-scatter': 7 * 8 * 128 * 4, 'all-reduce': 96 * 2}
  assert traffic.sent == {
    'all-gather': 7 * (16 / 2 + 32 * 3 / 4) * 128 * 4,
    'reduce-scatter': 7 * 8 * 128 * 4 * 3 / 4,
    'all-reduce': 96 * 2 * 2 * 7 / 8,
  }
  value = 8 * 128 * 4
  # One of the hundred rows is read. In the loop: both sides of the gather, the value and what is left of it, and the source of the copy.
  assert traffic.hbm == 2 * 512 + 7 * (3 * value + (value + value / 4) + value) + 96 * 2


def test_traffic_refuses_other_text():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.traffic('module @jit_f {\n}\n')


def test_traffic_of_a_compiled_loop():
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  def chain(a, weights):
    def layer(a, w):
      return jax.lax.with_sharding_constraint(a @ w, place(None, 'x')), None

    return jax.lax.scan(layer, a, weights)[0]

  a = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place(None, 'x'))
  weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=place(None, None, 'x'))
  text = jax.jit(chain, out_shardings=place(None, 'x')).lower(a, weights).compile().as_text()
  traffic = hlo.traffic(text)
  # Each of the five layers gathers the activations over x once.
  assert traffic.count == {'all-gather': 5} and traffic.size == {'all-gather': 5 * 16 * 64 * 4}
  assert traffic.sent == {'all-gather': 5 * 16 * 64 * 4 * 3 / 4}
  assert traffic.hbm >= 5 * (64 * 16 + 16 * 16) * 4  # at least the weights are read and the results are written
