"""The models of the Python API: parameters on devices with their tokenizer and template, loaded from any supported format."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer, exporter, run_folder
from polar_jax.checkpoints.loaded import Loaded
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import MeshConfig, ModelConfig, RftConfig, RolloutConfig, TemplateConfig
from polar_jax.data import survey, vocabulary
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.conversation_template import open_template
from polar_jax.data.examples import as_triplets
from polar_jax.data.pipeline import TripletSegments
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from polar_jax.evaluate import statistics
from polar_jax.evaluate.clusters import cluster
from polar_jax.evaluate.statistics import Interval
from polar_jax.model.heads import init_params
from polar_jax.runtime import paths
from polar_jax.scoring.exact import ExactScorer
from polar_jax.scoring.scorer import Scorer
from polar_jax.types import Group, Prompt, Text, Triplet, UserError

Example = Mapping[str, Any] | Triplet
RewardFunction = Callable[..., Sequence[float]]


class Model:
  """Parameters on devices with the configuration, tokenizer and mesh needed to use them.

  Attributes:
    params: the model's parameters, a nested dict of arrays sharded over the mesh.
    config: shape of the model and how it is computed.
    tokenizer: of the checkpoint; None if it has none.
    mesh: devices that hold the parameters.
    source: the checkpoint on disk that the model was read from; None for a model that was trained in this process.
  """

  head = ''

  def __init__(
    self,
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    *,
    template: TemplateConfig | None = None,
    source: Pretrained | None = None,
  ):
    if tokenizer is not None:
      vocabulary.check_tokenizer(tokenizer, config.known_vocab_size, str(source.path) if source else 'the model')
    self.params, self.config, self.tokenizer, self.mesh, self.source = params, config, tokenizer, mesh, source
    self.template_config = template or TemplateConfig()

  @classmethod
  def init(cls, config: ModelConfig, tokenizer: Tokenizer | str | pathlib.Path, *, mesh: Mesh | None = None, seed: int = 0) -> Any:
    """Return a model with random parameters.

    Args:
      config: shape of the model; without a `vocab_size` it takes the tokenizer's.
      tokenizer: a tokenizer, its path, or 'byte'.
      mesh: devices; None: all, parameters sharded over them.
      seed: of the parameters.
    """
    mesh = default_mesh() if mesh is None else mesh
    opened = open_any_tokenizer(tokenizer, None)
    assert opened is not None
    if config.vocab_size is None:
      config = dataclasses.replace(config, vocab_size=opened.vocab_size)
    return cls(init_params(config, cls.head, mesh, seed), config, opened, mesh)

  def save(self, folder: str | pathlib.Path) -> None:
    """Write a checkpoint of this project: unchanged parameters, settings and tokenizer. `load` reads it back bit for bit.

    Raises:
      UserError: the folder already holds a checkpoint.
    """
    folder = paths.path_of(folder)
    if checkpointer.exists(folder):
      raise UserError(f'{folder}: already holds a checkpoint; name another folder')
    if self.tokenizer is not None:
      run_folder.keep_tokenizer(self.tokenizer, folder)
    checkpointer.save_params(folder, self.params, run_folder.model_settings(self.head, self.config, self.template_config, self.tokenizer))

  def save_pretrained(self, folder: str | pathlib.Path, dtype: str | None = None) -> None:
    """Write a Hugging Face folder that transformers, vLLM and SGLang load.

    Args:
      folder: is created; must be empty if it exists.
      dtype: 'float32', 'bfloat16' or 'float16' for the tensors; None keeps the dtype of the parameters.

    Raises:
      UserError: the folder holds files, or a value does not fit `dtype`.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
      raise UserError(f'{folder}: exists and is not empty; name another folder')
    exporter.write_folder(
      folder,
      self.params,
      self.config,
      self.head,
      architecture=self.source.architecture if self.source else None,
      template=self.template_config,
      tokenizer=self.tokenizer,
      assets=self.source.assets if self.source else None,
      dtype=dtype,
    )

  def as_pretrained(self) -> Pretrained:
    """Return the model in the form of a checkpoint on disk, to start a run from."""
    path = self.source.path if self.source else pathlib.Path('memory')
    return Loaded(path, 'memory', self.config, self.head, arrays=self.params, text=self.tokenizer, reward_template=self.template_config)

  def __repr__(self) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
    where = f', from {self.source.path}' if self.source else ''
    return f'{type(self).__name__}({self.config.family}, {count / 1e6:,.1f}M parameters{where})'


class RewardModel(Model):
  """A reward model: scores how likely candidates came from the policy that wrote the reference (equation 4 of the paper)."""

  head = 'reward'

  @functools.cached_property
  def template(self) -> Template:
    """Turns prompt, reference and candidate into token ids."""
    if self.tokenizer is None:
      raise UserError('the reward model has no tokenizer; pass one to load(..., tokenizer=...)')
    model = str(self.source.path) if self.source else 'the model'
    return open_template(self.template_config, self.tokenizer, self.config.known_vocab_size, model)

  @functools.cached_property
  def scorer(self) -> Scorer:
    """Scores groups of candidates packed densely; one compilation for each row length of a short ladder."""
    return Scorer(self.params, self.config, self.template, self.mesh, ladder=True)

  @functools.cached_property
  def exact_scorer(self) -> ExactScorer:
    """Scores each candidate alone, so that no bit of a reward depends on the other candidates."""
    return ExactScorer(self.params, self.config, self.template, self.mesh)

  def score(self, prompt: Text, reference: Text, candidates: Sequence[Text], *, wrapper: str = 'sft') -> np.ndarray:
    """Score candidates for one prompt and reference, whose computation they share.

    Args:
      prompt: a string or a list of messages.
      reference: a response of the policy to be recognized, in the same forms.
      candidates: any number of texts.
      wrapper: 'sft' puts a newline between prompt and response; 'pretrain' puts nothing.

    Returns:
      float32 `(n,)`, higher for candidates closer to the reference's policy. Apart from rounding no reward depends on the others.

    Raises:
      UserError: an input is neither a string nor a list of messages, or a candidate is too long.
    """
    _check_texts(candidates, 'candidates')
    (rewards,) = self.scorer.score([Group(prompt, reference, list(candidates), wrapper)], alone=True)
    return rewards

  def score_batch(self, examples: Sequence[Mapping[str, Any]], *, exact: bool = False) -> np.ndarray:
    """Score a batch of single candidates.

    Args:
      examples: dicts with `prompt`, `reference` and `output`, and optionally `wrapper`. Candidates with equal prompt and reference
        share their computation.
      exact: compute each reward alone, so that its bits depend on nothing else, as the `score` stage does. Slower.

    Returns:
      float32 `(n,)` in the order of the examples.

    Raises:
      UserError: an example cannot be scored; the message names it.
    """
    groups = [self._group(i, example) for i, example in enumerate(examples)]
    if exact:
      return self.exact_scorer.score(groups)
    members: dict[tuple[str, ...], list[int]] = {}
    for i, group in enumerate(groups):
      members.setdefault((repr(group.prompt), repr(group.reference), group.wrapper), []).append(i)
    merged = [dataclasses.replace(groups[m[0]], candidates=[groups[i].candidates[0] for i in m]) for m in members.values()]
    rewards = np.zeros(len(groups), np.float32)
    for indices, scored in zip(members.values(), self.scorer.score(merged, alone=True), strict=True):
      rewards[indices] = scored
    return rewards

  def _group(self, index: int, example: Mapping[str, Any]) -> Group:
    """Return an example as a group of one candidate."""
    fields = ('prompt', 'reference', 'output') if self.template_config.use_reference else ('prompt', 'output')
    missing = [name for name in fields if name not in example]
    if missing:
      raise UserError(f'example {index} has no {missing[0]!r}; an example is a dict with {", ".join(fields)}')
    return Group(example['prompt'], example.get('reference', ''), [example['output']], example.get('wrapper') or 'sft')

  def score_pairs(self, examples: Sequence[Example]) -> np.ndarray:
    """Return the rewards of both candidates of ranked examples (`prompt`, `reference`, `chosen`, `rejected`), float32 `(n, 2)`."""
    return self.scorer.score_pairs(as_triplets(examples))

  def policy_scorer(self, args: RftConfig, prompts: Sequence[Prompt]) -> Scorer:
    """Return a scorer of fixed shape for PPO.

    Its rows hold the longest prompt and reference with a response of `args.rollout.max_new` tokens.
    """
    from polar_jax.ppo.rewards.sources import scored_row_length

    config = args.reward
    length = config.row_length or scored_row_length(self.template, prompts, config.wrapper, args.rollout.max_new)
    return Scorer(self.params, self.config, self.template, self.mesh, row_length=length, rows=config.rows_per_batch, grow=True)

  def accuracy(self, examples: Sequence[Example]) -> Interval:
    """Return the share of ranked examples whose chosen candidate scores higher, with a 95% bootstrap interval. Ties count half.

    The interval resamples clusters of dependent examples: those of one policy if `metadata` names it, else those of one prompt.

    Args:
      examples: dicts with `prompt`, `reference`, `chosen` and `rejected`, or Triplets.

    Warns:
      UserWarning: pairs are the same to the model, or texts are truncated; with their number and those of the first.
    """
    triplets = as_triplets(examples)
    for line in survey.survey(TripletSegments(triplets, self.template), range(len(triplets))).lines():
      warnings.warn(line, stacklevel=2)
    rewards_NC = self.scorer.score_pairs(triplets).astype(np.float64)
    correct = statistics.pair_correct(rewards_NC[:, 0], rewards_NC[:, 1])
    return statistics.accuracy_interval(correct, cluster(triplets))

  def as_reward_func(self, reference: str = 'reference', *, wrapper: str = 'sft') -> RewardFunction:
    """Return a reward function in TRL's signature, for `reward_funcs=` of its trainers and of compatible ones.

    Args:
      reference: name of the data set's column with the reference responses.
      wrapper: as in `score`.

    Returns:
      `f(prompts, completions, **columns) -> list[float]`; prompts and completions are strings or lists of messages.
    """

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
      if reference not in columns and self.template_config.use_reference:
        raise UserError(
          f'the data set has no column {reference!r} with the reference responses; its columns are: {", ".join(sorted(columns)) or "none"}'
        )
      references = columns.get(reference) or [''] * len(prompts)
      examples = zip(prompts, references, completions, strict=True)
      return self.score_batch([{'prompt': p, 'reference': r, 'output': c, 'wrapper': wrapper} for p, r, c in examples]).tolist()

    reward.__name__ = 'polar_reward'  # TRL names its metrics after the function
    return reward


class LanguageModel(Model):
  """A causal language model: a policy, or the starting point of a reward model."""

  head = 'lm'

  @functools.cached_property
  def chat(self) -> ChatTemplate | None:
    """The chat template in the checkpoint's folder; None for a base model."""
    from polar_jax.ppo import policy, prompts

    assets = policy.assets_of(self.as_pretrained())
    return None if assets is None else prompts.open_chat(assets, 'auto')

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end a response."""
    from polar_jax.ppo import policy, prompts

    return prompts.stop_ids(self._tokenizer, policy.assets_of(self.as_pretrained()), None, self.chat)

  @property
  def _tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise UserError('the language model has no tokenizer; pass one to load(..., tokenizer=...)')
    return self.tokenizer

  def generate(
    self, prompts: Sequence[Text], *, max_new: int = 256, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
  ) -> list[str]:
    """Sample one response to each prompt.

    Args:
      prompts: strings, which are continued unchanged, or lists of messages, which the model's chat template renders.
      max_new: most tokens of a response.
      temperature: 0 takes the most likely token.
      top_p: sample from the smallest set of tokens with this much probability.
      seed: the same seed gives the same responses.

    Returns:
      The responses as text, without special tokens, in the order of the prompts.

    Raises:
      UserError: a prompt is empty, or the model has no tokenizer.
    """
    from polar_jax.ppo import policy

    _check_texts(prompts, 'prompts')
    rollout = RolloutConfig(max_new=max_new, temperature=temperature, top_p=top_p)
    return policy.generate(
      self.params, self.config, self._tokenizer, self.mesh, prompts, chat=self.chat, stop_ids=self.stop_ids, rollout=rollout, seed=seed
    )

  def logprobs(self, prompts: Sequence[Text], responses: Sequence[str]) -> list[np.ndarray]:
    """Log-probability of every token of given responses, at temperature 1.

    Args:
      prompts: as in `generate`.
      responses: texts that are tokenized on their own, one for each prompt.

    Returns:
      For each response float32 `(its number of tokens,)`, in nats; their sum is the response's log-likelihood.

    Raises:
      UserError: a response has no token, or the numbers of prompts and responses differ.
    """
    from polar_jax.ppo import policy

    _check_texts(prompts, 'prompts')
    _check_texts(responses, 'responses')
    return policy.logprobs(self.params, self.config, self._tokenizer, self.mesh, prompts, responses, self.chat)


class ValueModel(Model):
  """A value model of PPO: predicts the expected future reward at every token."""

  head = 'value'


_MODELS: dict[str, type[Model]] = {cls.head: cls for cls in (RewardModel, LanguageModel, ValueModel)}


def _check_texts(texts: Any, name: str) -> None:
  """Reject a single string, which is itself a sequence of strings."""
  if isinstance(texts, (str, bytes)):
    raise UserError(f'{name} must be a sequence of texts, not a single string; pass [text]')


def load(
  path: str | pathlib.Path | Pretrained,
  *,
  head: str | None = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  compute: ModelConfig | None = None,
  template: TemplateConfig | None = None,
  tokenizer: Tokenizer | str | None = None,
) -> Any:
  """Load a model: a run of this project, a Hugging Face folder, a GGUF or llama2.c file, or a run in a bucket (gs://, s3://).

  Args:
    path: folder or file.
    head: 'reward', 'lm' or 'value'; None: the checkpoint's own. A language model opened as a reward or value model gets a new
      head, whose scores are meaningless before training; reward and value models convert into each other.
    dtype: 'float32' or 'bfloat16', for parameters and computation; None: parameters as stored, computation in float32.
    mesh: devices of the parameters; None: all devices, with parameters sharded over them.
    compute: precision, attention backend and rematerialization; overrides the compute dtype given by `dtype`.
    template: settings of the reward template that override the checkpoint's; None: the checkpoint's.
    tokenizer: a tokenizer, or the path of one; None: the checkpoint's.

  Returns:
    A RewardModel, LanguageModel or ValueModel.

  Raises:
    UserError: the checkpoint does not exist or cannot be used; the message has the reason.
  """
  if dtype not in (None, 'float32', 'bfloat16'):
    raise UserError(f"dtype is {dtype!r}; it must be 'float32' or 'bfloat16'")
  if head not in (None, *_MODELS):
    raise UserError(f'head is {head!r}; it must be one of: {", ".join(_MODELS)}')
  opened = path if isinstance(path, Pretrained) else open_pretrained(path)
  mesh = default_mesh() if mesh is None else mesh
  config = opened.compute_like(compute or ModelConfig(compute_dtype=dtype or 'float32'))
  head = head or opened.head
  return _MODELS[head](
    opened.head_params(mesh, dtype, head),
    config,
    open_any_tokenizer(tokenizer, opened),
    mesh,
    template=opened.template(template or TemplateConfig()),
    source=opened,
  )


def default_mesh() -> Mesh:
  """Return a mesh of all devices, with parameters sharded over them."""
  return sharding.make_mesh(MeshConfig())


def open_any_tokenizer(given: Tokenizer | str | pathlib.Path | None, opened: Pretrained | None) -> Tokenizer | None:
  """Return a tokenizer given as an object, a path or 'byte'; None: that of a checkpoint, if it has one."""
  if isinstance(given, (str, pathlib.Path)):
    return ByteTokenizer() if given == 'byte' else open_tokenizer(given)
  if given is not None or opened is None:
    return given
  return opened.tokenizer() if opened.has_tokenizer else None
