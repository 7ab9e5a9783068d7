"""The parts of a decoder layer as pure functions. Derivatives are written by hand where XLA's own are slow."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from polar_jax.config import ModelConfig


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float | None) -> nnx.Param:
  """Create a float32 parameter with named axes.

  Args:
    rngs: source of random keys.
    shape: of the parameter.
    axes: logical name of each axis (`polar_jax.sharding.RULES`).
    std: standard deviation of a normal distribution; 0: zeros; None: ones (norm scales).
  """
  if std is None:
    value = jnp.ones(shape, jnp.float32)
  elif std == 0:
    value = jnp.zeros(shape, jnp.float32)
  else:
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
  return nnx.Param(value, axes=axes)


def project(x: jax.Array, weight: jax.Array, inputs: int = 1, bias: nnx.Param | None = None) -> jax.Array:
  """Contract the last axes of x with the first axes of a weight.

  This is one matmul of two matrices, because with more axes XLA's CPU backend first transposes the operands of every weight gradient.

  Args:
    x: activations (B, T, ...).
    weight: cast to the dtype of x.
    inputs: number of axes to contract.
    bias: added to the result, if given.
  """
  rows, outer = x.shape[:-inputs], weight.shape[inputs:]
  wide = weight.reshape(math.prod(weight.shape[:inputs]), -1).astype(x.dtype)
  out = (x.reshape(-1, wide.shape[0]) @ wide).reshape(*rows, *outer)
  return out if bias is None else out + bias[...].astype(x.dtype)[(None,) * len(rows)]


def project_few(x: jax.Array, transposed: jax.Array, inputs: int = 1, bias: nnx.Param | None = None) -> jax.Array:
  """Compute `project` for few rows and a weight whose input axes come last: 1.5 times as fast for 32 rows on a CPU.

  The weight is the left operand, so that the matmul divides its rows among the cores.

  Args:
    x: activations (B, T, ...).
    transposed: the weight, cast to the dtype of x.
    inputs: number of axes to contract.
    bias: added to the result, if given.
  """
  rows, outer = x.shape[:-inputs], transposed.shape[:-inputs]
  wide = transposed.reshape(math.prod(outer), -1).astype(x.dtype)
  # Without the barrier XLA swaps the operands to avoid the transposition.
  out = jax.lax.optimization_barrier(wide @ x.reshape(-1, wide.shape[1]).T).T.reshape(*rows, *outer)
  return out if bias is None else out + bias[...].astype(x.dtype)[(None,) * len(rows)]


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float, zero_centered: bool = False) -> jax.Array:
  """Apply RMSNorm over the last of any number of axes in float32, cast back, then scale: the order of InternLM2.

  Args:
    x_BTD: activations.
    scale_D: scales.
    eps: added to the mean of squares.
    zero_centered: add 1 to the scales, and scale before casting: Gemma's norm.
  """
  return _rms_norm(x_BTD, 1 + scale_D.astype(jnp.float32), eps, True) if zero_centered else _rms_norm(x_BTD, scale_D, eps, False)


def _like_last_axis(scale_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
  return scale_D[(None,) * (x_BTD.ndim - 1)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float, scale_first: bool) -> jax.Array:
  return _rms_norm_forward(x_BTD, scale_D, eps, scale_first)[0]


def _rms_norm_forward(x_BTD, scale_D, eps, scale_first):
  x32_BTD = x_BTD.astype(jnp.float32)
  inverse_BT1 = jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True) + eps)
  scale_dtype = jnp.float32 if scale_first else x_BTD.dtype
  out_BTD = (x32_BTD * inverse_BT1).astype(scale_dtype) * _like_last_axis(scale_D.astype(scale_dtype), x_BTD)
  return out_BTD.astype(x_BTD.dtype), (x_BTD, scale_D, inverse_BT1)


def _rms_norm_backward(_, saved, d_out_BTD):
  """Compute sums of products as contractions, because XLA's fused multiply-and-sum is twenty times slower on CPUs."""
  x_BTD, scale_D, inverse_BT1 = saved
  normed_BTD = x_BTD.astype(jnp.float32) * inverse_BT1
  d_out_BTD = d_out_BTD.astype(jnp.float32)
  rows = 'BTN'[: x_BTD.ndim - 1]
  d_scale_D = jnp.einsum(f'{rows}D,{rows}D->D', d_out_BTD, normed_BTD)
  d_normed_BTD = d_out_BTD * _like_last_axis(scale_D.astype(jnp.float32), x_BTD)
  along_BT1 = jnp.einsum(f'{rows}D,{rows}D->{rows}', d_normed_BTD, normed_BTD)[..., None] / x_BTD.shape[-1]
  d_x_BTD = inverse_BT1 * (d_normed_BTD - normed_BTD * along_BT1)
  return d_x_BTD.astype(x_BTD.dtype), d_scale_D.astype(scale_D.dtype), None


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
  """Compute silu(gate) * up. Only the two inputs are saved for the derivative."""
  return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(gate_BTF, up_BTF):
  return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(saved, d_out_BTF):
  gate_BTF, up_BTF = saved
  sigmoid_BTF = jax.nn.sigmoid(gate_BTF)
  d_gate_BTF = d_out_BTF * up_BTF * sigmoid_BTF * (1 + gate_BTF * (1 - sigmoid_BTF))
  return d_gate_BTF, d_out_BTF * gate_BTF * sigmoid_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def geglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
  """Compute gelu(gate) * up with the tanh approximation of gelu. Only the two inputs are saved for the derivative."""
  return jax.nn.gelu(gate_BTF, approximate=True) * up_BTF


def _geglu_forward(gate_BTF, up_BTF):
  return geglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _geglu_backward(saved, d_out_BTF):
  _, pull = jax.vjp(lambda gate_BTF, up_BTF: jax.nn.gelu(gate_BTF, approximate=True) * up_BTF, *saved)
  return pull(d_out_BTF)


geglu.defvjp(_geglu_forward, _geglu_backward)

GATED = {'silu': swiglu, 'gelu_tanh': geglu}  # by `config.model.activation`


def scale_embeddings(x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
  """Apply `config.embedding_scale`. The factor has the dtype of the embeddings, as in Gemma."""
  return x_BTD * jnp.asarray(config.d_model**0.5, x_BTD.dtype) if config.embedding_scale else x_BTD


def rope_frequencies(config: ModelConfig, positions_BT: jax.Array) -> jax.Array:
  """Return the radians per position (B or 1, H/2) of each pair of a head, scaled according to `config.rope_scaling`.

  'dynamic' depends on the length of a row's longest sequence once that exceeds `max_position`, so such a sequence gets the frequencies
  that it would get alone only if no longer one shares its row. The other scalings are constants, rounded once.
  """
  c = config
  exponent_h = np.arange(0, c.head_dim, 2) / c.head_dim
  frequency_h = c.rope_theta**-exponent_h
  if c.rope_scaling == 'linear':
    frequency_h = frequency_h / c.rope_factor
  elif c.rope_scaling == 'llama3':
    # Frequencies with more than `high` rotations over the original length are kept, those with fewer than `low` are divided by the
    # factor, and those in between are interpolated.
    rotations_h = c.rope_original_length * frequency_h / (2 * math.pi)
    kept_h = np.clip((rotations_h - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor), 0, 1)
    frequency_h = kept_h * frequency_h + (1 - kept_h) * frequency_h / c.rope_factor
  elif c.rope_scaling == 'yarn':
    frequency_h = _yarn(c, frequency_h)
  frequency_1h = jnp.asarray(frequency_h, jnp.float32)[None]
  if c.rope_scaling != 'dynamic':
    return frequency_1h
  length_B1 = jnp.max(positions_BT, axis=1, keepdims=True).astype(jnp.float32) + 1
  stretch_B1 = c.rope_factor * length_B1 / c.max_position - (c.rope_factor - 1)
  theta_B1 = c.rope_theta * jnp.maximum(stretch_B1, 1.0) ** (c.head_dim / (c.head_dim - 2))
  stretched_Bh = theta_B1 ** -jnp.asarray(exponent_h, jnp.float32)[None]
  return jnp.where(length_B1 > c.max_position, stretched_Bh, frequency_1h)


def _yarn(c: ModelConfig, frequency_h: np.ndarray) -> np.ndarray:
  """Interpolate frequencies by YaRN (Peng et al., 2023, section 3.2): a ramp over whole pairs, as in transformers."""
  # The pair, as a real number, that rotates so many times over the original length.
  pair = lambda rotations: c.head_dim / 2 * math.log(c.rope_original_length / (2 * math.pi * rotations), c.rope_theta)
  low, high = max(math.floor(pair(c.rope_beta_fast)), 0), min(math.ceil(pair(c.rope_beta_slow)), c.head_dim - 1)
  divided_h = np.clip((np.arange(len(frequency_h)) - low) / (high - low or 0.001), 0, 1)
  return (1 - divided_h) * frequency_h + divided_h * frequency_h / c.rope_factor


def _attention_factor(c: ModelConfig) -> float:
  """Return the factor of rotated queries and keys; equation 22 of YaRN in the form that models were trained with."""
  if c.rope_scaling != 'yarn':
    return 1.0
  return c.rope_attention_factor or 0.1 * math.log(max(c.rope_factor, 1.0)) + 1.0


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (cos, sin) of shape (B, T, H/2), times the attention factor of YaRN.

  Angles are float32, because bfloat16 cannot distinguish positions 256 and 257.
  """
  angle_BTh = positions_BT[..., None].astype(jnp.float32) * rope_frequencies(config, positions_BT)[:, None]
  # A loop is a barrier to fusion; without it XLA recomputes the tables for every head of every unrolled layer.
  cos_BTh, sin_BTh = jax.lax.map(lambda sine: jnp.where(sine, jnp.sin(angle_BTh), jnp.cos(angle_BTh)), jnp.array([False, True]))
  factor = _attention_factor(config)
  return (cos_BTh, sin_BTh) if factor == 1.0 else (cos_BTh * factor, sin_BTh * factor)


def apply_rope(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
  """Rotate the first half of each head against the second half (rotate-half, as in NeoX and InternLM2)."""
  cos, sin = (t[:, :, None, :].astype(x_BTNH.dtype) for t in (cos_BTh, sin_BTh))
  first, second = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
