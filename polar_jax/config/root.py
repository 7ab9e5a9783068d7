"""The whole config."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option, section
from polar_jax.config.certify import CertifyConfig
from polar_jax.config.data import DataConfig, TemplateConfig, TokenizerConfig
from polar_jax.config.model import ModelConfig
from polar_jax.config.rft import RftConfig, StudyConfig
from polar_jax.config.serve import ServeConfig
from polar_jax.config.synthesis import SynthesizeConfig
from polar_jax.config.tools import ConvertConfig, EvaluateConfig, FitConfig, PlanConfig, ScoreConfig, SweepConfig
from polar_jax.config.training import CheckpointingConfig, DistributedConfig, MeshConfig, ProfileConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  stage: str = option('all', 'Stage to run, or several in order, separated by commas; all and plan stand alone.')
  seed: int = option(0, 'Seed of all random numbers.', min=0, max=2**31 - 1)
  checkpoint: str | None = option(
    None, "Checkpoint to convert, or to score or evaluate with, and that of tokenizer.kind 'checkpoint' (None: what the stage starts from)."
  )
  input: str | None = option(
    None,
    'Required by score: its examples, a .jsonl, .jsonl.gz or .parquet file, or a folder of `save_to_disk`; evaluate also takes several, '
    'separated by commas.',
  )
  output: str | None = option(
    None,
    'Required by convert and score: the folder of the converted checkpoint, or the .jsonl or .jsonl.gz file of scored examples; and by '
    'evaluate on given data: the folder of its results.',
  )
  model: ModelConfig = section(ModelConfig())
  tokenizer: TokenizerConfig = section(TokenizerConfig())
  template: TemplateConfig = section(TemplateConfig())
  data: DataConfig = section(DataConfig())
  synthesize: SynthesizeConfig = section(SynthesizeConfig())
  pretrain_lm: TrainConfig = section(TrainConfig(start_from='scratch'), 'Next-token pre-training of the language model.')
  pretrain: TrainConfig = section(TrainConfig(), 'Contrastive pre-training of the reward model on triplets.')
  finetune: TrainConfig = section(TrainConfig(start_from='pretrain'), 'Fine-tuning of the reward model on ranked data.')
  rft: RftConfig = section(RftConfig())
  study: StudyConfig = section(StudyConfig())
  ablations: bool = option(
    False,
    'Also fine-tune without pre-training and without the reference (Table 7 of the paper); rft: also with the rule as the only reward, '
    'and on the references.',
  )
  equal_compute: bool = option(
    False, 'Also fine-tune without pre-training on as many tokens as pre-training and fine-tuning read together.'
  )
  ablation_learning_rate: float | None = option(
    None,
    'Learning rate of the fine-tunings without pre-training, whose reward head is new. None: finetune.learning_rate.',
    exclusive_min=0,
  )
  seeds: int = option(1, 'Fine-tune so many times, with the seeds `seed`, `seed` + 1, ...; accuracies are means over them.', min=1)
  checkpointing: CheckpointingConfig = section(CheckpointingConfig())
  mesh: MeshConfig = section(MeshConfig())
  compile_cache: str | None = option(None, 'Folder of compiled programs for later starts. None: JAX_COMPILATION_CACHE_DIR, if set.')
  profile: ProfileConfig = section(ProfileConfig())
  distributed: DistributedConfig = section(DistributedConfig())
  evaluate: EvaluateConfig = section(EvaluateConfig())
  sweep: SweepConfig = section(SweepConfig())
  fit: FitConfig = section(FitConfig())
  plan: PlanConfig = section(PlanConfig())
  convert: ConvertConfig = section(ConvertConfig())
  score: ScoreConfig = section(ScoreConfig())
  serve: ServeConfig = section(ServeConfig())
  certify: CertifyConfig = section(CertifyConfig())
