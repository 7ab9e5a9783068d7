"""The arguments of every command-line stage: config, workdir, devices, and the data that several stages read."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from polar_jax.api import RunSettings
from polar_jax.checkpoints import pretrained
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import Config, ConfigError, ModelConfig, TemplateConfig, TrainConfig
from polar_jax.data import vocabulary
from polar_jax.data.conversation_template import open_template
from polar_jax.data.examples import open_triplets, report_skipped
from polar_jax.data.readers import is_one_split
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer, load_tokenizer
from polar_jax.runtime import paths
from polar_jax.types import Triplet

# Runs that a stage of the same workdir may start from. Each name is also that of the run's folder.
RUNS = ('pretrain_lm', 'pretrain', 'finetune', 'finetune_only', 'finetune_no_reference', 'finetune_equal_compute')
SCRATCH = 'scratch'
_SEED = re.compile(r'_seed_[1-9]\d*$')


def is_run(reference: str) -> bool:
  """Return whether a setting that names a checkpoint means a run of the workdir: one of `RUNS`, or a further seed of one."""
  return _SEED.sub('', reference) in RUNS


@dataclasses.dataclass(frozen=True)
class Context:
  """The arguments of every stage.

  Attributes:
    config: settings of all stages.
    workdir: folder of results, logs and checkpoints.
    mesh: devices of this run.
    log: receives lines of progress.
    cache: open tokenizers and examples by the settings that determine them. Contexts made with `dataclasses.replace` share it, so
      that a sweep opens its data once.
  """

  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  log: Callable[[str], None]
  cache: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

  @property
  def data(self) -> pathlib.Path:
    """Folder of the data that the synthesize stage writes."""
    return self.workdir / 'data'

  def home(self, run: str) -> pathlib.Path:
    """Return the folder of a run's checkpoints and tokenizer: in `checkpointing.folder` if that is set, else in the workdir."""
    elsewhere = self.config.checkpointing.folder
    return (paths.path_of(elsewhere) if elsewhere else self.workdir) / run

  def checkpoint(self, reference: str) -> pathlib.Path:
    """Resolve a checkpoint that a setting names: a run of this workdir (see `RUNS`) or a path."""
    return self.home(reference) if is_run(reference) else paths.path_of(reference)

  def init(self, train: TrainConfig) -> pathlib.Path | str:
    """Return the checkpoint that `train.start_from` names, or 'scratch'."""
    return SCRATCH if train.start_from == SCRATCH else self.checkpoint(train.start_from)

  def tokenizer(self, start_from: str | None = None) -> Tokenizer:
    """Open the tokenizer that the config names.

    Args:
      start_from: the stage's setting of that name. With `tokenizer.kind='checkpoint'` the tokenizer is that of `config.checkpoint` if
        it is set, else that of this checkpoint.

    Raises:
      UserError: the tokenizer does not exist, or its kind is 'checkpoint' and no checkpoint is named.
    """
    config = self.config.tokenizer
    if config.kind != 'checkpoint':
      return self._cached(('tokenizer', config), lambda: load_tokenizer(config, self.data / 'tokenizer.json'))
    path = self.config.checkpoint or start_from
    seen = set[str]()
    while path and is_run(path) and path not in seen:  # a run has the tokenizer of what it started from
      seen.add(path)
      path = getattr(self.config, 'finetune' if path.startswith('finetune') else path).start_from
    if path is None or path == SCRATCH or is_run(path):
      raise ConfigError(
        "tokenizer.kind is 'checkpoint', but no checkpoint is named: set checkpoint, or the stage's start_from, to a folder or file"
      )
    return self._cached(('tokenizer', path), lambda: open_pretrained(path).tokenizer())

  def reward_model(self, stage: str) -> tuple[Pretrained, Tokenizer, Template]:
    """Open `config.checkpoint`, the reward model that a stage uses, with its tokenizer and template; no parameters are read.

    Raises:
      ConfigError: it is not set, or has another head.
      UserError: it cannot be read, or its tokenizer or template cannot be used.
    """
    config = self.config
    if not config.checkpoint:
      raise ConfigError('checkpoint is not set: name the folder or file of a reward model with --config.checkpoint=PATH')
    checkpoint = paths.path_of(config.checkpoint)
    opened = open_pretrained(checkpoint)
    if opened.head != 'reward':
      kind = {'lm': 'a language model', 'value': 'a value model'}[opened.head]
      raise ConfigError(f'checkpoint {checkpoint}: is {kind}; the {stage} stage needs a reward model')
    tokenizer = opened.tokenizer() if config.tokenizer.kind == 'checkpoint' else self.tokenizer()
    template = open_template(opened.template(config.template), tokenizer, opened.model.known_vocab_size, str(checkpoint))
    if template.config.chat == 'always':
      self.log(f'{stage}: {checkpoint} reads prompt and output through its chat template (template.chat=never: through that of POLAR)')
    return opened, tokenizer, template

  def template_config(self, use_reference: bool = True) -> TemplateConfig:
    """Return the template's settings; `use_reference=False` hides the reference (ablation)."""
    settings = self.config.template
    return dataclasses.replace(settings, use_reference=settings.use_reference and use_reference)

  def template(self, tokenizer: Tokenizer | None = None) -> Template:
    """Return the template with a tokenizer; None: the config's."""
    return open_template(self.config.template, tokenizer or self.tokenizer())

  def model_config(self, tokenizer: Tokenizer | None = None, train: TrainConfig | None = None) -> ModelConfig:
    """Return the model's shape with the vocabulary of a tokenizer.

    Args:
      tokenizer: None: the config's.
      train: a stage's settings. If the config sets no shape, it is that of the checkpoint that the stage starts from, if there is one.

    Raises:
      VocabularyError: the model's vocabulary is too small for the tokenizer.
    """
    model = self.config.model
    if train is not None and pretrained.has_no_shape(model):
      start = self.init(train)
      if isinstance(start, pathlib.PurePath) and start.exists():
        return open_pretrained(start).first_layers(train.start_layers).compute_like(model)
    tokenizer = tokenizer or self.tokenizer()
    if model.vocab_size is None:
      return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    vocabulary.check_tokenizer(tokenizer, model.vocab_size, f'model.vocab_size={model.vocab_size}')
    return model

  def triplets(self, split: str) -> Sequence[Triplet]:
    """Return the pre-training examples of a split: those of `data.triplets`, or of the synthesize stage.

    Raises:
      ConfigError: there is no such data.
      NoSplitError: the data set has no such split.
    """
    return self._examples('data.triplets', self.config.data.triplets, 'triplets', split)

  def preferences(self, split: str) -> Sequence[Triplet]:
    """Return the fine-tuning examples of a split: those of `data.preferences`, or of the synthesize stage.

    Raises:
      ConfigError: there is no such data.
      NoSplitError: the data set has no such split.
    """
    return self._examples('data.preferences', self.config.data.preferences, 'preferences', split)

  def _examples(self, setting: str, given: str | None, synthesized: str, split: str) -> Sequence[Triplet]:
    data = self.config.data
    path = paths.path_of(given) if given else self.data / synthesized
    if split != 'train' and data.validation:
      setting, path = 'data.validation', paths.path_of(data.validation)
    elif split != 'train' and is_one_split(path):
      raise ConfigError(f'data.validation must name held-out examples: {path} is a single split, and the model trains on it')
    if not path.exists():
      raise ConfigError(f'{setting}: nothing at {path}; name a data set there, or run the synthesize stage in this workdir first')
    key = ('examples', str(path), split, data.on_bad_example)
    return self._cached(key, lambda: report_skipped(open_triplets(path, split, data.on_bad_example), path, self.log))

  def run_arguments(self, run: str) -> dict[str, Any]:
    """Return the keyword arguments of `api.train_reward_model` and `api.train_policy` that are the same for all runs of this workdir."""
    config = self.config
    settings = RunSettings(
      seed=config.seed,
      log=self.log,
      name=run,
      checkpointing=config.checkpointing,
      checkpoint_dir=self.home(run),
      profile=config.profile,
    )
    return {'output_dir': self.workdir / run, 'mesh': self.mesh, 'settings': settings}

  def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
    """Return the value of a key, and make it if it is not in the cache yet."""
    if key not in self.cache:
      self.cache[key] = make()
    return self.cache[key]
