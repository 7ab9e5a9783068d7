"""From the raw reward of a response to the one that PPO maximizes: normalized, clipped, minus penalties for truncation and length.

The order matters: `clip` is in units of the normalized reward, and the penalties come last so that they mean the same whatever the
scale of the raw reward. The mean of the penalties is not subtracted again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polar_jax.config import RewardConfig

_EPSILON = 1e-6  # added to standard deviations


class Normalizer:
  """Normalization of raw rewards by `kind` (`RewardConfig.normalize`):

    none       unchanged (the paper's recipe)
    running    minus the mean, over the standard deviation of all rewards so far, those of the batch included: the first batch is
               normalized by itself, and no reward by the statistics of others alone
    group      minus the mean, over the standard deviation of the responses to one prompt; equal rewards become 0
    reference  minus the reward of the prompt's reference: r(prompt, reference, response) - r(prompt, reference, reference)

  Standard deviations are those of a population, plus 1e-6. Only `running` has a state: its count, mean and squares.
  """

  def __init__(self, kind: str):
    self.kind = kind
    self._count, self._mean, self._squares = 0, 0.0, 0.0  # squares: the sum of squared differences from the mean

  def normalize(self, raw_R: np.ndarray, group_R: np.ndarray, reference_score_R: np.ndarray | None) -> np.ndarray:
    """Return normalized rewards, float32. With 'running' this updates the statistics, so call it once per batch.

    Args:
      raw_R: float32.
      group_R: int, equal for responses to one prompt.
      reference_score_R: float32, of each response's reference; only 'reference' needs it.
    """
    raw = raw_R.astype(np.float64)
    if self.kind == 'running':
      self._update_statistics(raw)
      raw = (raw - self._mean) / ((self._squares / max(self._count, 1)) ** 0.5 + _EPSILON)
    elif self.kind == 'group':
      _, group, size = np.unique(group_R, return_inverse=True, return_counts=True)
      centered = raw - (np.bincount(group, raw) / size)[group]
      raw = centered / (np.sqrt(np.bincount(group, centered**2) / size)[group] + _EPSILON)
    elif self.kind == 'reference':
      if reference_score_R is None:
        raise ValueError("normalize='reference' needs the rewards of the references")
      raw = raw - reference_score_R.astype(np.float64)
    return raw.astype(np.float32)

  def to_json(self) -> dict[str, Any]:
    """Return the state; JSON keeps every bit of it."""
    return {'kind': self.kind, 'count': self._count, 'mean': self._mean, 'squares': self._squares}

  @classmethod
  def from_json(cls, state: dict[str, Any]) -> Normalizer:
    """Restore the result of `to_json`."""
    out = cls(state['kind'])
    out._count, out._mean, out._squares = state['count'], state['mean'], state['squares']
    return out

  def _update_statistics(self, raw: np.ndarray) -> None:
    """Merge a batch's mean and squares into those so far (Chan, Golub and LeVeque, 1979)."""
    if not raw.size:
      return
    mean, count = float(raw.mean()), self._count + raw.size
    difference = mean - self._mean
    self._squares += float(((raw - mean) ** 2).sum()) + difference**2 * self._count * raw.size / count
    self._mean += difference * raw.size / count
    self._count = count


def shape(
  raw_R: np.ndarray,
  *,
  normalizer: Normalizer,
  group_R: np.ndarray,
  reference_score_R: np.ndarray | None,
  length_R: np.ndarray,
  stopped_R: np.ndarray,
  max_new: int,
  config: RewardConfig,
) -> tuple[np.ndarray, dict[str, float]]:
  """Shape the rewards of a step's rollouts.

  They are normalized, clipped to +-`clip`, reduced by `missing_eos_penalty` for a response that no stop token ended, and by the length
  penalty, which grows linearly from 0 at `max_new - length_buffer` tokens to `length_penalty` at `max_new` (the soft overlong
  punishment of DAPO, arXiv 2503.14476, section 3.4). Rewards must be finite (see `sources.check_rewards`).

  Args:
    raw_R: float32.
    normalizer: of the run.
    group_R: int, equal for responses to one prompt.
    reference_score_R: float32 raw rewards of each response's reference; None unless `normalize` is 'reference'.
    length_R: int, tokens of the response, its stop token included.
    stopped_R: bool, whether a stop token ended the response.
    max_new: most tokens of a response.
    config: clip and penalties.

  Returns:
    (shaped rewards, float32; metrics: their spread, the share that was clipped, the mean of each penalty).
  """
  for name, array in (('raw_R', raw_R), ('reference_score_R', reference_score_R)):
    if array is not None and array.dtype != np.float32:
      raise TypeError(f'{name} must be float32, not {array.dtype}: rewards are fractions')
  normalized_R = normalizer.normalize(raw_R, group_R, reference_score_R)
  clipped_R = normalized_R if config.clip is None else normalized_R.clip(-config.clip, config.clip)
  missing_R = np.where(stopped_R, 0.0, config.missing_eos_penalty).astype(np.float32)
  overlong_R = _overlong_penalty(length_R, max_new, config)
  shaped_R = clipped_R - missing_R - overlong_R
  metrics = {
    'reward_std': _std(shaped_R),
    'reward_clipped': _mean(clipped_R != normalized_R),
    'missing_eos_penalty': _mean(missing_R),
    'length_penalty': _mean(overlong_R),
  }
  return shaped_R, metrics


def _overlong_penalty(length_R: np.ndarray, max_new: int, config: RewardConfig) -> np.ndarray:
  """Return the length penalty, float32, not negative."""
  if config.length_buffer is None:
    return np.zeros(len(length_R), np.float32)
  excess_R = (length_R - (max_new - config.length_buffer)) / config.length_buffer
  return (config.length_penalty * excess_R.clip(0.0, 1.0)).astype(np.float32)


def _mean(array: np.ndarray) -> float:
  return float(array.mean(dtype=np.float64)) if array.size else 0.0


def _std(array: np.ndarray) -> float:
  return float(array.std(dtype=np.float64)) if array.size else 0.0
