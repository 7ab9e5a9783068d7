"""The synthesize stage for pools of language models and the world of word problems; the miniature has its own (`polar_jax.miniature`)."""

from __future__ import annotations

from typing import Any

import jax

from polar_jax.config import ConfigError
from polar_jax.stages.context import Context


def synthesize(context: Context) -> dict[str, Any]:
  """Write the data to `workdir/data`. Returns the section `synthesize` of the report."""
  config = context.config
  if config.synthesize.world == 'pool':
    if not config.synthesize.pool:
      raise ConfigError('synthesize.pool is not set; set it to the file of a pool (docs/pools.md)')
    if jax.process_count() > 1:
      raise ConfigError(
        'stage synthesize with a pool runs in one process, which samples on other hosts through servers or Ray (synthesize.backend=ray); '
        'start it without distributed'
      )
    from polar_jax.synthesis import run

    return {'synthesize': run.synthesize(config.synthesize, config.seed, context.workdir, context.log)}
  if config.synthesize.world == 'files':
    from polar_jax.synthesis import split

    return {'synthesize': split.synthesize(config.synthesize, config.seed, context.workdir, context.log)}
  from polar_jax.synthesis import arithmetic

  return {'synthesize': arithmetic.synthesize(config.synthesize, config.seed, context.workdir, context.log)}
