"""Every option of polar_jax: its default, its help text and the values that it may take.

The dataclasses of this package are the single statement of an option. `default_config` turns them into the ConfigDict that config files
and the command line edit, and `parse` turns the edited ConfigDict into validated, frozen dataclasses; nothing below `parse` sees a
ConfigDict. --help and docs/options.md are generated from the same dataclasses.
"""

from polar_jax.config.base import ConfigError
from polar_jax.config.certify import CertifyConfig
from polar_jax.config.data import DataConfig, TemplateConfig, TokenizerConfig
from polar_jax.config.model import ATTENTION_BACKENDS, DTYPES, FAMILIES, REMAT_POLICIES, ROPE_SCALINGS, STORED_DTYPES, ModelConfig
from polar_jax.config.parsing import default_config, parse
from polar_jax.config.renamed import RENAMED, current_name
from polar_jax.config.rft import AlarmConfig, RewardConfig, RftConfig, RolloutConfig, StudyConfig
from polar_jax.config.root import Config
from polar_jax.config.serve import ServeConfig
from polar_jax.config.stages import STAGES, requested_stages
from polar_jax.config.synthesis import OF_FILES, PoolConfig, SynthesizeConfig
from polar_jax.config.tools import ConvertConfig, EvaluateConfig, FitConfig, PlanConfig, ScoreConfig, SweepConfig
from polar_jax.config.training import (
  PROJECTIONS,
  QUANTIZED,
  CheckpointingConfig,
  DistributedConfig,
  LoraConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  ProfileConfig,
  TrainConfig,
  check_adapters,
)

__all__ = [
  'ATTENTION_BACKENDS',
  'DTYPES',
  'FAMILIES',
  'OF_FILES',
  'PROJECTIONS',
  'QUANTIZED',
  'REMAT_POLICIES',
  'RENAMED',
  'ROPE_SCALINGS',
  'STAGES',
  'STORED_DTYPES',
  'AlarmConfig',
  'CertifyConfig',
  'CheckpointingConfig',
  'Config',
  'ConfigError',
  'ConvertConfig',
  'DataConfig',
  'DistributedConfig',
  'EvaluateConfig',
  'FitConfig',
  'LoraConfig',
  'LossConfig',
  'MeshConfig',
  'ModelConfig',
  'OptimizerConfig',
  'PlanConfig',
  'PoolConfig',
  'ProfileConfig',
  'RewardConfig',
  'RftConfig',
  'RolloutConfig',
  'ScoreConfig',
  'ServeConfig',
  'StudyConfig',
  'SweepConfig',
  'SynthesizeConfig',
  'TemplateConfig',
  'TokenizerConfig',
  'TrainConfig',
  'check_adapters',
  'current_name',
  'default_config',
  'parse',
  'requested_stages',
]
