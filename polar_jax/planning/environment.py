"""Environment variables of a process that compiles for chips it does not have. Set before JAX is imported, so this imports no JAX."""

from __future__ import annotations

import os


def prepare() -> None:
  """Keep JAX on the CPU, and keep libtpu from looking for chips, a metadata server or other processes that compile."""
  os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',  # flags for CPUs would change the compiled program
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',  # this and the next one only avoid warnings
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_LOG_DIR': 'disabled',
  }
