"""The synthesize stage for the world of word problems; the miniature has its own (`polar_jax.miniature`)."""

from __future__ import annotations

from typing import Any

from polar_jax.stages.context import Context
from polar_jax.synthesis import arithmetic


def synthesize(context: Context) -> dict[str, Any]:
  """Write prompts and preferences to `workdir/data`. Returns the section `synthesize` of the report."""
  return {'synthesize': arithmetic.synthesize(context.config.synthesize, context.config.seed, context.workdir, context.log)}
