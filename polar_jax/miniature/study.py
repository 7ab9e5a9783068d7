"""Proof of reinforcement fine-tuning where everything is known: in the miniature's world the target policy has an exact likelihood.

A small language model learns one corpus. It is then tuned towards a member of the pool that learned another one: the references are
samples of that target, the reward is the miniature's reward model, and neither ever sees a likelihood. Beside PPO stand best-of-n
from the same start, and supervised fine-tuning on the same references by the same trainer. All is measured on prompts that no stage
saw: the negative log-likelihood of the answers under the target's smoothed, untruncated law, in nats per token, and the same relative
to the mean over the pool, since repetitive text is likely under every policy.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from polar_jax.checkpoints import pretrained, run_folder
from polar_jax.config import ModelConfig, RftConfig
from polar_jax.data import layout, pipeline, text
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.miniature import cleanup, ngram, pool, vocabulary, world
from polar_jax.ppo import experience, metrics
from polar_jax.ppo import trainer as ppo_trainer
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import Run
from polar_jax.runtime.preemption import SigtermFlag
from polar_jax.stages import rft as rft_stage
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain_lm import language_model_run
from polar_jax.train import trainer
from polar_jax.types import Prompt, Rollouts

START_CORPUS, TARGET_CORPUS = 'docstrings', 'source'
_SIDE_BY_SIDE = 2  # seeds
BEST_OF = 8  # answers that best-of-n chooses from
_STREAM_REFERENCES, _STREAM_JUDGE = 30, 1_000_000_000  # of random numbers, beside those of the synthesize stage and of PPO's steps
FIGURES = ('reward', 'target_nll', 'relative_nll', 'kl', 'length', 'distinct_2')


@dataclasses.dataclass(frozen=True)
class Study:
  """What all seeds share.

  Attributes:
    target: the policy to come near to.
    policies: the pool, the target included, whose mean likelihood a figure is taken relative to.
    pieces: object (V,), the text of every token.
  """

  context: Context
  target: ngram.NgramPolicy
  policies: Sequence[ngram.NgramPolicy]
  pieces: np.ndarray
  tokenizer: Tokenizer
  model: ModelConfig
  reward: RewardSum

  @property
  def config(self) -> RftConfig:
    return self.context.config.rft


def rft(context: Context) -> dict[str, Any]:
  """Run the study `study.seeds` times. Returns the section `rft` of the report; see `polar_jax.report.rft`."""
  study = _open(context)
  p = study.target.params
  context.log(f'rft: target {p.name}: order {p.order}, corpus {p.corpus}, temperature {p.temperature:.2f}, top-p {p.top_p:.2f}')
  by_seed = _all_seeds(study)
  comparison = {name: {f: [seed[name][f] for seed in by_seed] for f in FIGURES if f in by_seed[0][name]} for name in by_seed[0]}
  out: dict[str, Any] = {'seeds': len(by_seed), 'kl': comparison['ppo']['kl']}
  for figure in ('reward', 'target_nll', 'relative_nll', 'length', 'distinct_2'):
    out |= {f'{figure}_before': comparison['start'][figure], f'{figure}_after': comparison['ppo'][figure]}
  return {'rft': out | {'comparison': comparison, 'target': p.to_json(), 'start_corpus': START_CORPUS, 'best_of': BEST_OF}}


def _all_seeds(study: Study) -> list[dict[str, dict[str, float]]]:
  """Figures by seed. The first runs alone and compiles what all of them share. On one device the others then run two at a time,
  because a small model's operations leave half of it idle; none of them knows of another."""
  seeds = range(study.context.config.study.seeds)
  if study.context.mesh.size > 1:  # two threads that start collectives in different orders would wait for each other
    return [_one_seed(study, seed) for seed in seeds]
  found = [_one_seed(study, seeds[0])]
  with SigtermFlag() as stop, concurrent.futures.ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
    try:
      return found + list(threads.map(lambda seed: _one_seed(study, seed), seeds[1:]))
    except BaseException:
      stop.set()  # the others save and stop too
      raise


def choose_target(policies: Sequence[ngram.NgramPolicy]) -> ngram.NgramPolicy:
  """The coolest of the policies of the highest order on the target's corpus: the one with the most of its own to be learned."""
  known = [p for p in policies if not p.params.held_out and p.params.corpus == TARGET_CORPUS]
  order = max(p.params.order for p in known)
  return min((p for p in known if p.params.order == order), key=lambda p: p.params.temperature)


def _open(context: Context) -> Study:
  policies = world.load_pool(context.workdir)
  pieces = vocabulary.Vocabulary(context.data / 'tokenizer.json').pieces
  known = [Prompt(t.prompt, t.reference) for t in context.triplets('validation')]
  reward = rft_stage.open_reward(context, context.config.rft, known)
  tokenizer = context.tokenizer()
  return Study(context, choose_target(policies), policies, pieces, tokenizer, context.model_config(tokenizer), reward)


def _one_seed(study: Study, seed: int) -> dict[str, dict[str, float]]:
  """Start, PPO, supervised, best-of-n and the target itself: figures of each, on the same unseen prompts."""
  context, c = study.context, study.config
  folder = f'rft/seed_{seed}'
  start = _train_start(study, seed, f'{folder}/start')
  tuning, held_out = _prompts(study, 'validation', seed), _prompts(study, 'unseen_prompts', seed, c.evaluate_prompts)
  ppo = _tuning_run(study, folder, c, seed, tuning, start)
  ppo_trainer.train(ppo)
  supervised = dataclasses.replace(c, method='sft', track_kl=False)
  sft = _tuning_run(study, f'{folder}/sft', supervised, seed, tuning, start)
  ppo_trainer.train(sft)
  judge = _Judge(study, ppo, held_out, _load(start, study))
  policies = {'ppo': judge.sample(_load(ppo.home, study)), 'sft': judge.sample(_load(sft.home, study))}
  found = judge.figures({'start': judge.sample(judge.start), **policies, 'best_of_n': judge.best_of(BEST_OF)})
  for name, figures in found.items():
    context.log(f'rft: seed {seed}: {name}: ' + ', '.join(f'{k} {v:.3f}' for k, v in figures.items()))
  return found


def _train_start(study: Study, seed: int, name: str) -> pathlib.Path:
  """The language model of another corpus. Returns its folder."""
  context, lm = study.context, dataclasses.replace(study.context.config.pretrain_lm, steps=study.context.config.study.start_steps)
  streams = text.load_streams(context.data / text.STREAMS)
  windows = pipeline.TextWindows(streams['train'][START_CORPUS], lm.sequence_length, seed)
  run = language_model_run(context, name, dataclasses.replace(lm, start_from='scratch'), study.tokenizer, windows, None, seed)
  trainer.train(run)
  return run.home


def _prompts(study: Study, split: str, seed: int, most: int | None = None) -> PolicyPrompts:
  """The first `most` prefixes of a split with references that the target writes, cleaned up as all trajectories of this world are."""
  s = study.context.config.synthesize
  texts = [t.prompt for t in itertools.islice(study.context.triplets(split), most)]
  ids = study.tokenizer.encode_batch([str(text) for text in texts])
  uniforms = np.random.default_rng([seed, _STREAM_REFERENCES, *map(ord, split)]).random((len(ids), s.max_tokens))
  prefixes = [np.asarray(i, np.int32) for i in ids]
  sampled, lengths, ended = study.target.sample_ids(prefixes, uniforms, s.temperature, min(s.top_p, study.target.params.top_p), s.top_k)
  lengths = cleanup.clean(sampled, lengths, ended, cleanup.boundaries(study.pieces))
  references = [''.join(study.pieces[row[:n]]) for row, n in zip(sampled, lengths, strict=True)]
  made = [Prompt(text, reference) for text, reference in zip(texts, references, strict=True) if reference]
  # No BOS: the language model learned from a stream of documents that has none.
  return PolicyPrompts(made, study.tokenizer, None, study.config.rollout.max_prompt, bos=False, log=study.context.log)


def _tuning_run(study: Study, name: str, config: RftConfig, seed: int, tuning: PolicyPrompts, start: pathlib.Path) -> Run:
  context = study.context
  prompts = [tuning[i][0] for i in range(len(tuning))]
  made = Run(
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
    initial_params=lambda: _load(start, study),
    fingerprint=run_folder.policy_settings(config, study.model, study.tokenizer, seed, prompts),
    log=context.log,
  )
  run_folder.keep_tokenizer(study.tokenizer, made.home)
  return made


def _load(folder: pathlib.Path, study: Study) -> dict[str, Any]:
  return pretrained.open_pretrained(folder).params(study.context.mesh, 'float32', head='lm')


class _Judge:
  """Measures policies on the same prompts with the same random numbers."""

  def __init__(self, study: Study, run: Run, held_out: PolicyPrompts, start: dict[str, Any]):
    self.start = start
    self._study, self._run = study, run
    chosen = [held_out[i] for i in range(len(held_out))]
    self._prompts, self._ids = [p for p, _ in chosen], [i for _, i in chosen]
    self._engine = RolloutEngine(run.model, run.mesh, run.config.rollout, run.stop_ids)

  def sample(self, params: dict[str, Any], samples: int = 1) -> Rollouts:
    """A policy's answers, `samples` to each prompt one after another."""
    ids = [i for i in self._ids for _ in range(samples)]
    with jax.set_mesh(self._run.mesh):
      return self._engine.generate(params, ids, (self._run.seed, _STREAM_JUDGE))

  def best_of(self, count: int) -> Rollouts:
    """The best of `count` answers of the start to each prompt, by the reward model with the held-out references."""
    rollouts = self.sample(self.start, count)
    prompts = [p for p in self._prompts for _ in range(count)]
    reward_R = self._reward(prompts, self._texts(rollouts))
    best = np.arange(0, len(prompts), count) + reward_R.reshape(-1, count).argmax(axis=1)
    return Rollouts([rollouts.prompts[r] for r in best], *(a[best] for a in rollouts[1:]))

  def figures(self, policies: Mapping[str, Rollouts]) -> dict[str, dict[str, float]]:
    """Figures of the answers of policies, one to each prompt, and of the references, which are the target's own."""
    study, references = self._study, [str(p.reference) for p in self._prompts]
    texts = {name: self._texts(rollouts) for name, rollouts in policies.items()} | {'target': references}
    answers = {name: [row[:n] for row, n in zip(r.tokens_RT, r.length_R, strict=True)] for name, r in policies.items()}
    answers['target'] = [np.asarray(r, np.int32) for r in study.tokenizer.encode_batch(references)]
    # All in one call, since most of its time goes into the policies, not into the answers.
    prefixes = [np.asarray(i, np.int32) for i in self._ids] * len(answers)
    in_order = [answer for part in answers.values() for answer in part]
    logprob_PR = pool.pool_logprobs(study.policies, prefixes, in_order, study.context.config.synthesize.workers)
    of_target = [p.name for p in study.policies].index(study.target.name)
    found = {}
    for name, logprob_Pr in zip(answers, np.split(logprob_PR, len(answers), axis=1), strict=True):
      tokens = sum(map(len, answers[name]))
      nll_P = -logprob_Pr.sum(axis=1) / tokens
      found[name] = {
        'reward': float(self._reward(self._prompts, texts[name]).mean()),
        'target_nll': float(nll_P[of_target]),
        'relative_nll': float(nll_P[of_target] - nll_P.mean()),
        'length': tokens / len(self._prompts),
        'distinct_2': metrics.distinct(texts[name], 2),
      }
      if name in policies and name != 'best_of_n':  # whose answers are no samples of the law that noted their log-probabilities
        found[name]['kl'] = self._kl(policies[name])
    return found

  def _texts(self, rollouts: Rollouts) -> list[str]:
    return metrics.response_texts(rollouts, self._run.tokenizer, self._run.stop_ids)

  def _reward(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    return self._study.reward.total(self._study.reward.components(prompts, responses))

  def _kl(self, rollouts: Rollouts) -> float:
    """Nats per token from the start, estimated on the policy's own answers."""
    run = self._run
    batches = layout.policy_batches(rollouts, range(len(self._ids)), run.row_length, experience.micro_batch_rows(run.config, run.mesh))
    with jax.set_mesh(run.mesh):
      (start_RT, _) = experience.run_forward(run.actor().forward, self.start, batches, run.mesh, rollouts, 2)
    mask_RT = layout.response_mask(rollouts)
    return float(((rollouts.logprob_RT - start_RT) * mask_RT).sum() / mask_RT.sum())
