"""The evaluate stage on benchmarks of policies: a language model, the tasks of lm-eval, and what they measure."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from typing import Any

import jax

from polar_jax import api
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import Config, ConfigError, EvaluateConfig
from polar_jax.runtime import json_files, paths
from polar_jax.stages.context import Context

RESULT, SAMPLES = 'policies.json', 'policies_samples.jsonl.gz'
# Options that only benchmarks of policies have.
_OWN = ('include_path', 'shots', 'limit', 'chat', 'max_length', 'max_new', 'answer_field', 'run_code')


def is_requested(config: Config) -> bool:
  """Return whether the config names benchmarks of policies.

  Raises:
    ConfigError: it names other data too, or has settings of such benchmarks without naming one.
  """
  if not config.evaluate.tasks:
    default = EvaluateConfig()
    given = [name for name in _OWN if getattr(config.evaluate, name) != getattr(default, name)]
    if given:
      raise ConfigError(f'evaluate.{given[0]} is set, but evaluate.tasks names no benchmark; name one, or drop the setting')
    return False
  others = {'input': config.input, 'evaluate.benchmarks': config.evaluate.benchmarks, 'evaluate.scores': config.evaluate.scores}
  both = next((name for name, value in others.items() if value), None)
  if both:
    raise ConfigError(f'evaluate.tasks is about a language model, and {both} about a reward model: run one after the other')
  return True


def run(context: Context) -> dict[str, Any]:
  """Run the benchmarks `evaluate.tasks` on the language model `checkpoint`; write policies.json and the responses to `output`.

  Returns:
    The section `policies` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: the checkpoint cannot be read, or no benchmark could be run.
  """
  config, settings = context.config, context.config.evaluate
  if not config.output:
    raise ConfigError(f'output is not set: name a folder for {RESULT} with --config.output=DIR')
  folder = paths.path_of(config.output)
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'output {folder}: is a file; name a folder')
  names = list(dict.fromkeys(part.strip() for part in (settings.tasks or '').split(',') if part.strip()))
  try:
    import lm_eval

    from polar_jax.policies import lm_eval_model, run
  except ModuleNotFoundError as error:
    raise ConfigError(f"evaluate.tasks needs lm-eval ({error}): pip install 'polar_jax[lm_eval]'") from error
  run.quiet()
  model = _model(context)
  policy = lm_eval_model.Policy(model, max_length=settings.max_length, max_gen_toks=settings.max_new, seed=config.seed)
  options = run.Options(
    include_path=None if settings.include_path is None else pathlib.Path(settings.include_path),
    shots=settings.shots,
    limit=settings.limit,
    chat=settings.chat == 'auto' and model.chat is not None,
    run_code=settings.run_code,
    answer_field=settings.answer_field,
    resamples=settings.bootstrap,
  )
  found = run.evaluate(policy, names, options, context.log)
  facts = dataclasses.asdict(options) | {'include_path': settings.include_path, 'max_length': policy.max_length}
  result = {
    'checkpoint': str(config.checkpoint),
    'lm_eval': lm_eval.__version__,
    'options': facts | {'max_new': settings.max_new, 'seed': config.seed},
    'benchmarks': found.measured,
    'not_run': found.not_run,
  }
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(line, default=str) + '\n' for line in found.samples)
    paths.write_atomically(folder / SAMPLES, gzip.compress(lines.encode('utf-8'), mtime=0))
    paths.write_atomically(folder / RESULT, json_files.dumps(result, indent=2) + '\n')
  context.log(f'evaluate: {len(found.measured)} benchmarks in {folder / RESULT}, responses in {folder / SAMPLES}')
  return {'policies': {key: result[key] for key in ('options', 'benchmarks', 'not_run')}}


def _model(context: Context) -> api.LanguageModel:
  """Return the language model `checkpoint`.

  Raises:
    ConfigError: no checkpoint is named, or it is no language model.
  """
  config = context.config
  if not config.checkpoint:
    raise ConfigError('checkpoint is not set: name the language model to evaluate with --config.checkpoint=DIR')
  opened = open_pretrained(context.checkpoint(config.checkpoint))
  if opened.head != 'lm':
    raise ConfigError(f'checkpoint {opened.path}: has a {opened.head} head, but evaluate.tasks needs a language model')
  tokenizer = opened.tokenizer() if config.tokenizer.kind == 'checkpoint' else context.tokenizer()
  return api.load(opened, mesh=context.mesh, compute=config.model, tokenizer=tokenizer)
