"""The one attention interface: every query sees one interval of keys.

Causal, padded, packed and shared-prefix rows all fit it (see `polar_jax.data.rows`), so a mask is two integers per query and
never an array of T x S.
"""

from __future__ import annotations

from typing import Protocol

import jax

from polar_jax.model.attention import reference


class Backend(Protocol):
  """Softmax attention of each query over the keys [start, end), with softmax in float32 and scale head_dim ** -0.5."""

  def __call__(
    self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array, end_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in the dtype of q, lse_BTN in float32: the log of the sum of exponentials of the scaled logits).

    Differentiable in q, k and v through both outputs. A query with an empty interval gives out 0 and lse `reference.EMPTY`, and
    no gradient. N is a multiple of K: query head n reads key head n // (N / K). T and S may differ.
    """


_BACKENDS: dict[str, Backend] = {'reference': reference.attend}


def backend(name: str) -> Backend:
  """The implementation for `config.model.attention`; 'auto' picks the best one for the default device."""
  return _BACKENDS['reference' if name == 'auto' else name]
