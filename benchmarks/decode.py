"""Rollout throughput of a model with random weights, and its share of the bound that reading the weights sets.

    python benchmarks/decode.py                                        # the 26M Llama of rollout.py
    python benchmarks/decode.py --preset=smollm2_135m --slots 8 32 --dtypes float32 bfloat16
    python benchmarks/decode.py --preset=qwen2_5_7b --slots 128        # on an accelerator

A decoding step reads every weight once (of the input embedding, only the rows of its tokens), so that at best it takes the bytes of the
weights over the memory's bandwidth, which is measured here by adding to a large array. Caches and activations are not in the bound. All
responses have `--length` tokens. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import nnx
from shapes import LLAMA_26M

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RolloutConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.presets import PRESETS
from polar_jax.ppo.rollout import RolloutEngine

_LONGEST_PROMPT = 128


def bandwidth(rounds: int, gib: float) -> float:
  """Return the bytes per second that one device reads and writes, over an array of so many GiB."""
  array = jnp.zeros(int(gib * 2**30 / 4), jnp.float32)
  add = jax.jit(lambda x: x + 1)

  def run() -> None:
    jax.block_until_ready(add(array))

  (seconds,) = timing.alternate({'add': run}, rounds).values()
  return 2 * array.nbytes / statistics.median(seconds)


def weight_bytes(config: ModelConfig, params: dict, dtype: str) -> int:
  """Return the bytes that a decoding step reads of the weights, in the type in which it computes."""
  embedding = 0 if config.tie_embeddings else int(np.prod(params['decoder']['embedding'].shape))
  return (sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) - embedding) * jnp.dtype(dtype).itemsize


def measure(config: ModelConfig, slots: int, length: int, rounds: int) -> list[float]:
  """Return the tokens per second of every round."""
  mesh = sharding.make_mesh(MeshConfig())
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)))()
  engine = RolloutEngine(config, mesh, RolloutConfig(max_prompt=_LONGEST_PROMPT, max_new=length, max_concurrent=slots), ())
  rng = np.random.default_rng(0)
  prompts = [rng.integers(1, config.vocab_size, int(n)).tolist() for n in rng.integers(24, _LONGEST_PROMPT, slots)]

  def run() -> None:
    assert engine.generate(params, prompts, (0,)).length_R.tolist() == [length] * slots

  (seconds,) = timing.alternate({'rollout': run}, rounds).values()
  return [slots * length / s for s in seconds]


def main() -> None:
  """Measure and print."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--preset', choices=PRESETS, help='shape of the model; default: a Llama of 26M parameters')
  parser.add_argument('--slots', type=int, nargs='+', default=[32, 128], help='responses at a time')
  parser.add_argument('--dtypes', nargs='+', choices=('float32', 'bfloat16'), default=['float32' if runs_on_cpu() else 'bfloat16'])
  parser.add_argument('--length', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--array', type=float, default=0.5 if runs_on_cpu() else 4.0, help='GiB of the array that measures the bandwidth')
  args = parser.parse_args()
  shape = PRESETS[args.preset] if args.preset else LLAMA_26M
  base = ModelConfig(**{'vocab_size': 32_768, **shape})
  base = dataclasses.replace(base, scan_unroll=base.num_layers if runs_on_cpu() else base.scan_unroll)
  abstract = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(LanguageModel(base, rngs=nnx.Rngs(0)), nnx.Param)))
  speed, rows, found = bandwidth(args.rounds, args.array), [], {}
  for dtype in args.dtypes:
    config = dataclasses.replace(base, compute_dtype=dtype)
    size = weight_bytes(config, abstract, dtype)
    for slots in args.slots:
      tokens = measure(config, slots, args.length, args.rounds)
      bound = slots * speed / size
      value = statistics.median(tokens)
      spread = f'{value:,.0f} [{min(tokens):,.0f}, {max(tokens):,.0f}]'
      rows.append((dtype, slots, f'{size / 1e6:,.0f}', spread, f'{bound:,.0f}', f'{100 * value / bound:.0f}%'))
      found[f'{dtype}_{slots}'] = {'tokens_per_second': round(value, 1), 'bound': round(bound, 1)}
  print(
    f'{jax.devices()[0].device_kind}: {speed / 1e9:.1f} GB/s; {args.preset or "Llama of 26M parameters"}, responses of {args.length} tokens'
  )
  print(timing.table(('type', 'at a time', 'weights, MB', 'tokens/s: median [range]', 'bound, tokens/s', 'share'), rows))
  timing.report(preset=args.preset or 'llama_26m', bandwidth=speed, length=args.length, device=jax.devices()[0].device_kind, **found)


if __name__ == '__main__':
  main()
