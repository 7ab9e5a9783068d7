"""The environment of a process that compiles for chips it does not have. Imports no JAX: it must be set before."""

from __future__ import annotations

import os


def prepare() -> None:
  """Keeps JAX on the CPU, and libtpu from looking for chips, for a metadata server or for other processes that compile."""
  os.environ |= {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',  # flags for a CPU would change what is compiled here
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',  # this and the next only spare warnings
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_LOG_DIR': 'disabled',
  }
