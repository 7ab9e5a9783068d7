"""The command `lm_eval` with the model `polar_jax`: `python -m polar_jax.policies run --model polar_jax --model_args path=DIR --tasks T`.

lm-eval finds models of other packages only if these are imported first, which is all that this command adds. Batches are as large as the
device allows unless `--batch_size` is given: lm-eval's default is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_jax.types import UserError


def main(arguments: Sequence[str]) -> int:
  """Run lm-eval on the arguments of its own command line.

  Returns:
    The exit status: 1 after an error that a message explains.
  """
  try:
    from lm_eval import __main__ as lm_eval

    from polar_jax.policies import lm_eval_model  # noqa: F401  registers the model
  except ModuleNotFoundError as error:
    print(f"polar_jax: {error}; lm-eval comes with pip install 'polar_jax[lm_eval]'", file=sys.stderr)
    return 1
  given = list(arguments)
  is_run = bool(given) and (given[0] == 'run' or given[0].startswith('-')) and not {'-h', '--help'} & {*given}
  if is_run and not any(word.startswith(('--batch_size', '-b')) for word in given):
    given += ['--batch_size', 'auto']
  sys.argv = ['lm_eval', *given]
  try:
    lm_eval.cli_evaluate()
  except UserError as error:
    print(f'polar_jax: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
