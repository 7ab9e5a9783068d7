"""Compile the TPU kernels, forward and backward, without a TPU, and print one JSON line per case.

Needs libtpu, but starts no backend for it. This is a separate program, because libtpu reads its environment once and stays loaded.
Usage: python compile_for_tpu.py TOPOLOGY QUERIES,KEYS,HEADS,KV_HEADS,HEAD_DIM,DTYPE ...
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'XLA_FLAGS': '',  # those for fake devices and quick compiles on a CPU would change what is compiled here
  'TPU_SKIP_MDS_QUERY': '1',  # no metadata server
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # another process may be compiling too; no chip is taken
  'TPU_ACCELERATOR_TYPE': 'v5p-8',  # these two only avoid warnings
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_LOG_DIR': 'disabled',
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from polar_jax.model.attention import tpu
from polar_jax.model.attention.reference import SAVED


def compile_case(device, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: str) -> dict:
  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

  def run(q, k, v, start, end, out_gradient, lse_gradient):
    keep = jax.checkpoint_policies.save_only_these_names(SAVED)
    primals, pull = jax.vjp(jax.checkpoint(lambda q, k, v: tpu.attend(q, k, v, start, end), policy=keep), q, k, v)
    return primals, pull((out_gradient, lse_gradient))

  interval, key_shape = array(1, queries, dtype=jnp.int32), (1, keys, kv_heads, dim)
  began = time.perf_counter()
  compiled = (
    jax.jit(run)
    .lower(
      array(1, queries, heads, dim),
      array(*key_shape),
      array(*key_shape),
      interval,
      interval,
      array(1, queries, heads, dim),
      array(1, queries, heads, dtype=jnp.float32),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  return {
    'kernels': compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    'temporary_bytes': memory.temp_size_in_bytes,
    'argument_bytes': memory.argument_size_in_bytes,
    'seconds': round(time.perf_counter() - began, 1),
  }


if __name__ == '__main__':
  topology, *cases = sys.argv[1:]
  chip = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  for case in cases:
    *sizes, dtype = case.split(',')
    print(json.dumps({'case': case, **compile_case(chip, *map(int, sizes), dtype)}), flush=True)
