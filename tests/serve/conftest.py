"""A tiny reward model, and servers of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from reward_server import Running, running, tiny_model

import polar_jax


@pytest.fixture(scope='session')
def model() -> polar_jax.RewardModel:
  return tiny_model()


@pytest.fixture(scope='session')
def serve(model) -> Callable[..., contextlib.AbstractContextManager[Running]]:
  """Return a context manager that starts a server of the model."""
  return lambda **changes: running(model, **changes)


@pytest.fixture(scope='session')
def exact_server(model) -> Iterator[Running]:
  with running(model) as server:
    yield server


@pytest.fixture(scope='session')
def packed_server(model) -> Iterator[Running]:
  with running(model, exact=False) as server:
    yield server
