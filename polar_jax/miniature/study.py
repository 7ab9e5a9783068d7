"""A controlled study of reinforcement fine-tuning: in the miniature's world the target policy has an exact likelihood.

The miniature's language model, which has read documents by many policies of the pool, is tuned towards one of them, another in every
seed: the references are samples of that target, the reward is the miniature's reward model, and neither ever sees a likelihood. PPO is
compared with best-of-n from the same start and with supervised fine-tuning on the same references by the same trainer. All are measured
on prompts that no stage has seen: by the negative log-likelihood of the responses under the target's smoothed, untruncated
distribution, in nats per token, and by its difference from the mean over the pool, since repetitive text is likely under every policy.
Responses that the target finds likely need not be what it writes, so their token frequencies are compared with those of its own
responses as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from polar_jax.checkpoints import pretrained, run_folder
from polar_jax.config import ConfigError, ModelConfig, RftConfig
from polar_jax.data import identity, layout
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.miniature import ngram, pool, triplets, vocabulary, world
from polar_jax.ppo import experience, metrics
from polar_jax.ppo import policy as policy_lib
from polar_jax.ppo import trainer as ppo_trainer
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import Run
from polar_jax.stages import rft as rft_stage
from polar_jax.stages.context import Context
from polar_jax.types import Prompt, Rollouts

BEST_OF = 8  # responses that best-of-n chooses from
# Streams of random numbers, distinct from those of the synthesize stage and of PPO's steps.
_STREAM_REFERENCES, _STREAM_EVALUATION = 30, 1_000_000_000
METRICS = ('reward', 'reward_other', 'target_nll', 'relative_nll', 'divergence', 'kl', 'length', 'distinct_2')


@dataclasses.dataclass(frozen=True)
class Study:
  """What a seed needs; all but the target is shared by all seeds.

  Attributes:
    context: config, workdir and devices.
    start: folder of the language model that every run starts from.
    model: its shape.
    target: the policy to approach.
    policies: the pool, including the target; `relative_nll` is relative to its mean.
    pieces: object (V,), the text of every token.
    tokenizer: of the language model.
    reward: the reward of PPO.
  """

  context: Context
  start: pathlib.Path
  model: ModelConfig
  target: ngram.NgramPolicy
  policies: Sequence[ngram.NgramPolicy]
  pieces: np.ndarray
  tokenizer: Tokenizer
  reward: RewardSum

  @property
  def config(self) -> RftConfig:
    """Options of PPO."""
    return self.context.config.rft


def rft(context: Context) -> dict[str, Any]:
  """Run the study `study.seeds` times. Returns the section `rft` of the report; see `polar_jax.report.rft`.

  Raises:
    ConfigError: `rft.lora.rank` is set.
  """
  if context.config.rft.lora.rank:
    raise ConfigError('rft.lora.rank is set, but the study of the miniature tunes all parameters; set it to None')
  studies = _open(context)
  by_seed = [_one_seed(study, seed) for seed, study in enumerate(studies)]
  comparison = {name: {m: [seed[name][m] for seed in by_seed] for m in METRICS if m in by_seed[0][name]} for name in by_seed[0]}
  out: dict[str, Any] = {'seeds': len(by_seed), 'kl': comparison['ppo']['kl']}
  for metric in ('reward', 'reward_other', 'target_nll', 'relative_nll', 'divergence', 'length', 'distinct_2'):
    out |= {f'{metric}_before': comparison['start'][metric], f'{metric}_after': comparison['ppo'][metric]}
  return {'rft': out | {'comparison': comparison, 'targets': [s.target.params.to_json() for s in studies], 'best_of': BEST_OF}}


def choose_targets(policies: Sequence[ngram.NgramPolicy], count: int) -> list[ngram.NgramPolicy]:
  """Return the target of each seed: of every corpus in turn, the most distinctive policy that is not one yet.

  Distinctive are a high order and then a low temperature. Held-out policies and twins are not chosen.

  Raises:
    ConfigError: there are fewer policies than seeds.
  """
  known = [p for p in policies if not p.params.held_out and p.params.twin_of is None]
  if count > len(known):
    raise ConfigError(f'study.seeds is {count}, but the pool has {len(known)} policies to tune towards, and every seed takes another')
  by_corpus: dict[str, list[ngram.NgramPolicy]] = {}
  for policy in sorted(known, key=lambda p: (-p.params.order, p.params.temperature)):
    by_corpus.setdefault(policy.params.corpus, []).append(policy)
  rounds = itertools.zip_longest(*(by_corpus[corpus] for corpus in sorted(by_corpus)))
  return [policy for one_of_each in rounds for policy in one_of_each if policy is not None][:count]


def _open(context: Context) -> list[Study]:
  """Open the pool, the policy to start from, the reward and the tokenizer. Returns the study of each seed.

  Raises:
    ConfigError: `rft.policy` is not a language model of the miniature.
  """
  policies = world.load_pool(context.workdir)
  pieces = vocabulary.Vocabulary(context.data / 'tokenizer.json').pieces
  start = context.checkpoint(context.config.rft.policy)
  opened = policy_lib.check_policy(pretrained.open_pretrained(start), 'rft.policy')
  if opened.model.vocab_size != len(pieces):
    raise ConfigError(
      f'rft.policy {start}: has a vocabulary of {opened.model.vocab_size} tokens, and the miniature one of {len(pieces)}; '
      "set rft.policy to 'pretrain_lm' or to another language model of the miniature"
    )
  known = [Prompt(t.prompt, t.reference) for t in context.triplets('validation')]
  reward = rft_stage.open_reward(context, context.config.rft, known)
  targets, tokenizer = choose_targets(policies, context.config.study.seeds), context.tokenizer()
  return [Study(context, start, opened.model, target, policies, pieces, tokenizer, reward) for target in targets]


def _one_seed(study: Study, seed: int) -> dict[str, dict[str, float]]:
  """Return the metrics of the initial policy, PPO, supervised fine-tuning, best-of-n and the target itself, on the same unseen prompts."""
  context, c, p = study.context, study.config, study.target.params
  context.log(
    f'rft: seed {seed}: target {p.name}: order {p.order}, corpus {p.corpus}, temperature {p.temperature:.2f}, top-p {p.top_p:.2f}'
  )
  folder = f'rft/seed_{seed}'
  tuning, held_out = _prompts(study, 'validation', seed), _prompts(study, 'unseen_prompts', seed, c.evaluate_prompts)
  ppo = _tuning_run(study, folder, c, seed, tuning)
  ppo_trainer.train(ppo)
  supervised = dataclasses.replace(c, method='sft', track_kl=False)
  sft = _tuning_run(study, f'{folder}/sft', supervised, seed, tuning)
  ppo_trainer.train(sft)
  evaluator = _Evaluator(study, ppo, held_out)
  policies = {'ppo': evaluator.sample(_load(ppo.home, study)), 'sft': evaluator.sample(_load(sft.home, study))}
  measured = evaluator.measure({'start': evaluator.sample(evaluator.start), **policies, 'best_of_n': evaluator.best_of(BEST_OF)})
  for name, values in measured.items():
    context.log(f'rft: seed {seed}: {name}: ' + ', '.join(f'{k} {v:.3f}' for k, v in values.items()))
  return measured


def _prompts(study: Study, split: str, seed: int, max_prompts: int | None = None) -> PolicyPrompts:
  """Return the first `max_prompts` prefixes of a split, each with references by the target and by another policy.

  Both are sampled from the whole stream of a policy and cleaned up like all trajectories.
  """
  s = study.context.config.synthesize
  texts = [t.prompt for t in itertools.islice(study.context.triplets(split), max_prompts)]
  prefixes = [np.asarray(i, np.int32) for i in study.tokenizer.encode_batch([str(text) for text in texts])]
  rng = np.random.default_rng([seed, _STREAM_REFERENCES, *map(ord, split)])
  family = lambda policy: policy.params.twin_of or policy.name
  others = [i for i, p in enumerate(study.policies) if family(p) != family(study.target) and not p.params.held_out]
  target = [p.name for p in study.policies].index(study.target.name)
  policies = np.stack([np.full(len(texts), target), rng.choice(others, len(texts))], axis=1)
  everything = triplets.World(study.policies, {}, study.pieces, s, seed)
  sampled, lengths = triplets.sample_clean(everything, prefixes, policies, rng.random((*policies.shape, s.max_tokens)))
  references = [[''.join(study.pieces[row[:n]]) for row, n in zip(*two, strict=True)] for two in zip(sampled, lengths, strict=True)]
  prompts = [Prompt(text, own, other_reference=other) for text, (own, other) in zip(texts, references, strict=True) if own and other]
  # No BOS: the stream of documents that the language model was trained on has none.
  return PolicyPrompts(prompts, study.tokenizer, None, study.config.rollout.max_prompt, bos=False, log=study.context.log)


def _tuning_run(study: Study, name: str, config: RftConfig, seed: int, tuning: PolicyPrompts) -> Run:
  """Return a run that tunes the initial policy with `config`.

  Args:
    study: shared by all seeds.
    name: of the run and its folder in the workdir.
    config: options of PPO or of supervised fine-tuning.
    seed: of sampling and prompt order.
    tuning: training prompts.
  """
  context = study.context
  rows = {'rows': identity.prompts_digest([tuning[i][0] for i in range(len(tuning))], with_metadata=False)}
  run = Run(
    name=name,
    folder=context.workdir / name,
    home=context.home(name),
    config=config,
    model=study.model,
    checkpointing=context.config.checkpointing,
    profile=context.config.profile,
    mesh=context.mesh,
    seed=seed,
    prompts=tuning,
    held_out=None,
    tokenizer=study.tokenizer,
    stop_ids=(vocabulary.EOS_ID,),
    reward=study.reward,
    initial_params=lambda: _load(study.start, study),
    fingerprint=run_folder.policy_settings(config, study.model, study.tokenizer, seed, rows),
    log=context.log,
  )
  run_folder.keep_tokenizer(study.tokenizer, run.home)
  return run


def token_counts(rows: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
  """Return how often each token occurs in some token ids: int (vocab_size,)."""
  return np.bincount(np.concatenate(rows), minlength=vocab_size)


def divergence(count_V: np.ndarray, other_V: np.ndarray) -> float:
  """Return the Jensen-Shannon divergence of two distributions that are given as counts, in nats: from 0 (equal) to log 2 (disjoint)."""
  p, q = count_V / count_V.sum(), other_V / other_V.sum()
  middle = (p + q) / 2
  kl = lambda x: float(np.sum(x[x > 0] * np.log(x[x > 0] / middle[x > 0])))
  return (kl(p) + kl(q)) / 2


def _load(folder: pathlib.Path, study: Study) -> dict[str, Any]:
  """Return the float32 parameters of a language model."""
  return pretrained.open_pretrained(folder).params(study.context.mesh, 'float32', head='lm')


class _Evaluator:
  """Measures policies on the same prompts with the same random numbers."""

  def __init__(self, study: Study, run: Run, held_out: PolicyPrompts):
    self.start = _load(study.start, study)
    self._study, self._run = study, run
    chosen = [held_out[i] for i in range(len(held_out))]
    self._prompts, self._ids = [p for p, _ in chosen], [i for _, i in chosen]
    self._engine = RolloutEngine(run.model, run.mesh, run.config.rollout, run.stop_ids)

  def sample(self, params: dict[str, Any], samples: int = 1) -> Rollouts:
    """Return a policy's responses, `samples` consecutive ones for each prompt."""
    ids = [i for i in self._ids for _ in range(samples)]
    with jax.set_mesh(self._run.mesh):
      return self._engine.generate(params, ids, (self._run.seed, _STREAM_EVALUATION))

  def best_of(self, count: int) -> Rollouts:
    """Return, for each prompt, the response of the initial policy with the highest reward among `count`, given the held-out reference."""
    rollouts = self.sample(self.start, count)
    prompts = [p for p in self._prompts for _ in range(count)]
    reward_R = self._reward(prompts, self._texts(rollouts))
    best = np.arange(0, len(prompts), count) + reward_R.reshape(-1, count).argmax(axis=1)
    return Rollouts([rollouts.prompts[r] for r in best], *(a[best] for a in rollouts[1:]))

  def measure(self, policies: Mapping[str, Rollouts]) -> dict[str, dict[str, float]]:
    """Return the metrics of policies, each with one response per prompt, and of the references, which are samples of the target."""
    study, references = self._study, [str(p.reference) for p in self._prompts]
    texts = {name: self._texts(rollouts) for name, rollouts in policies.items()} | {'target': references}
    responses = {name: [row[:n] for row, n in zip(r.tokens_RT, r.length_R, strict=True)] for name, r in policies.items()}
    responses['target'] = [np.asarray(r, np.int32) for r in study.tokenizer.encode_batch(references)]
    # One call for all, because most of its time is spent per policy rather than per response.
    prefixes = [np.asarray(i, np.int32) for i in self._ids] * len(responses)
    in_order = [response for of_policy in responses.values() for response in of_policy]
    logprob_PR = pool.pool_logprobs(study.policies, prefixes, in_order, study.context.config.synthesize.workers)
    target = [p.name for p in study.policies].index(study.target.name)
    others = [dataclasses.replace(p, reference=p.other_reference) for p in self._prompts]
    measured, counts = {}, {name: token_counts(rows, len(study.pieces)) for name, rows in responses.items()}
    for name, logprob_Pr in zip(responses, np.split(logprob_PR, len(responses), axis=1), strict=True):
      tokens = sum(map(len, responses[name]))
      nll_P = -logprob_Pr.sum(axis=1) / tokens
      measured[name] = {
        'reward': float(self._reward(self._prompts, texts[name]).mean()),
        'reward_other': float(self._reward(others, texts[name]).mean()),
        'target_nll': float(nll_P[target]),
        'relative_nll': float(nll_P[target] - nll_P.mean()),
        'length': tokens / len(self._prompts),
        'distinct_2': metrics.distinct(texts[name], 2),
      }
      # Best-of-n responses are not samples of the policy that recorded their log-probabilities, so those give no KL.
      if name != 'target':
        measured[name]['divergence'] = divergence(counts[name], counts['target'])
      if name in policies and name != 'best_of_n':
        measured[name]['kl'] = self._kl(policies[name])
    return measured

  def _texts(self, rollouts: Rollouts) -> list[str]:
    """Return the responses as text."""
    return metrics.response_texts(rollouts, self._run.tokenizer, self._run.stop_ids)

  def _reward(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return the total reward of each response."""
    return self._study.reward.total(self._study.reward.components(prompts, responses))

  def _kl(self, rollouts: Rollouts) -> float:
    """Return the KL divergence from the initial policy in nats per token, estimated on the policy's own responses."""
    run = self._run
    batches = layout.policy_batches(rollouts, range(len(self._ids)), run.row_length, experience.micro_batch_rows(run.config, run.mesh))
    with jax.set_mesh(run.mesh):
      (start_RT, _) = experience.run_forward(run.actor().forward, self.start, batches, run.mesh, rollouts, 2)
    mask_RT = layout.response_mask(rollouts)
    return float(((rollouts.logprob_RT - start_RT) * mask_RT).sum() / mask_RT.sum())
