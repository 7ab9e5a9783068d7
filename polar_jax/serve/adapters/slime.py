"""A reward function for slime: `--custom-rm-path polar_jax.serve.adapters.slime.reward`. A sample's `label` is the reference."""

from __future__ import annotations

from typing import Any

from polar_jax.serve.adapters.shared import answer, plain, shared_client


async def reward(args: Any, sample: Any, **_: Any) -> float | list[float]:
  """Return the reward of a sample, or with `--group-rm` those of a list of samples.

  Args:
    args: of slime; not used.
    sample: has `prompt`, `response` and `label`.

  Raises:
    UserError: there is no reward.
  """
  if isinstance(sample, list):
    columns = [plain(one.prompt) for one in sample], [plain(one.label) for one in sample], [answer(one.response, True) for one in sample]
    return await shared_client().ascore_rows(*columns)
  return await shared_client().ascore_one(plain(sample.prompt), plain(sample.label), answer(sample.response, True))
