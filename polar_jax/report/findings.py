"""The first lines of report.md: what a workdir has shown, in words and one figure, and what it has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polar_jax.report import markdown, plots, sections

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

FIGURE = 'findings'
_MAIN, _WITHOUT = 'pretrained_finetuned', 'finetuned_only'
_FITS_WELL = 0.95  # R2 below which the points do not look like a power law
_COLORS = {True: '#0072B2', False: '#A6A6A6'}


class Finding(NamedTuple):
  """An answer to one of the questions that the method is about.

  Attributes:
    text: question and answer, as Markdown.
    draw: adds its numbers to a panel of the figure.
  """

  text: str
  draw: Callable[[Axes], None]


def find(results: Mapping[str, Any]) -> list[Finding]:
  """Return what report.json answers: whether pre-training helps, whether PPO moves the policy, and whether loss follows compute."""
  pretraining = _pretraining(results.get('finetune', {})) or _pretraining_by_set(results.get('evaluation', {}).get('sets', {}))
  found = (pretraining, _ppo(results.get('rft', {})), _compute(results.get('scaling', {})))
  return [finding for finding in found if finding is not None]


def section(findings: list[Finding], figures: Mapping[str, str]) -> list[str]:
  """Return the paragraphs of the findings; none without a finding."""
  if not findings:
    return []
  figure = markdown.figure(figures, FIGURE, 'What was shown')
  return [markdown.bullets([finding.text for finding in findings]), *figure]


def figure(findings: list[Finding]) -> Figure:
  """Draw a panel for each finding."""
  with plots.style():
    drawn = plots.new_figure(max(3.3 * len(findings), 4.8), 2.6)
    for axes, finding in zip(drawn.subplots(1, len(findings), squeeze=False).flat, findings, strict=True):
      finding.draw(axes)
  return drawn


def _pretraining(finetune: Mapping[str, Any]) -> Finding | None:
  arms, margin = finetune.get('arms', {}), finetune.get('margin_over_arms', {}).get(_WITHOUT)
  if margin is None or not {_MAIN, _WITHOUT} <= arms.keys():
    return None
  answer = 'yes' if margin['low'] > 0 else 'no, it does harm' if margin['high'] < 0 else 'not shown, the interval of the difference has 0'
  points, low, high = (100 * margin[key] for key in ('difference', 'low', 'high'))
  text = (
    f'**Does pre-training help?** With equal fine-tuning data: {answer}. {sections.accuracy(arms[_MAIN])}% with it, '
    f'{sections.accuracy(arms[_WITHOUT])}% without: {points:+.1f} points [{low:+.1f}, {high:+.1f}].'
  )

  def draw(axes: Axes) -> None:
    for i, (name, label) in enumerate(((_MAIN, 'with'), (_WITHOUT, 'without'))):
      accuracy, low, high = (100 * arms[name][key] for key in ('accuracy', 'low', 'high'))
      axes.bar(label, accuracy, color=_COLORS[i == 0], width=0.6, yerr=[[accuracy - low], [high - accuracy]], capsize=3)
    axes.axhline(50, color='black', linestyle=':', linewidth=1)
    axes.set(ylim=(0, 100), ylabel='accuracy, %', title='pre-training')

  return Finding(text, draw)


def _pretraining_by_set(sets: Mapping[str, Any]) -> Finding | None:
  margins = {name: found['arms'][_WITHOUT]['main_minus'] for name, found in sets.items() if _WITHOUT in found.get('arms', {})}
  if not margins:
    return None
  n, better, worse = len(margins), [k for k, m in margins.items() if m['low'] > 0], [k for k, m in margins.items() if m['high'] < 0]
  shown = {name: f'`{markdown.escape(name)}` {100 * margin["difference"]:+.1f}' for name, margin in margins.items()}
  listed = lambda names: f'{len(names)} ({", ".join(shown[name] for name in names)})' if names else '0'
  text = (
    f'**Does pre-training help?** With equal fine-tuning data, of {n} held-out sets the model with pre-training is better on '
    f'{listed(better)} and worse on {listed(worse)}, in points with an interval that is clear of 0; '
    f'the other {n - len(better) - len(worse)} leave it open.'
  )

  def draw(axes: Axes) -> None:
    for i, margin in enumerate(margins.values()):
      difference, low, high = (100 * margin[key] for key in ('difference', 'low', 'high'))
      bars = [[difference - low], [high - difference]]
      axes.errorbar([difference], [i], xerr=bars, fmt='o', markersize=3, capsize=2, color=_COLORS[bool(margin['low'] > 0)])
    axes.axvline(0, color='black', linestyle=':', linewidth=1)
    axes.set(yticks=range(n), xlabel='points', title='gain by pre-training')
    axes.set_yticklabels(list(margins), fontsize=6)

  return Finding(text, draw)


def _ppo(rft: Mapping[str, Any]) -> Finding | None:
  """Judge by the negative log-likelihood under the target relative to the pool where it was measured, else by the reward."""
  measured = (
    ('relative_nll', 'The NLL of its responses under the target, relative to the pool', ' nats per token', -1),
    ('reward', 'The reward', '', 1),
  )
  for key, what, unit, sign in measured:
    before, after = (np.ravel(rft.get(f'{key}_{when}', ())).astype(float) for when in ('before', 'after'))
    if not before.size or before.shape != after.shape:
      continue
    moved = int(sum(sign * (after - before) > 0))
    n, change = len(before), after - before
    answer = 'yes' if moved == n else 'no' if not moved else f'in {moved} of {n} seeds'
    seeds = f'in {n} seeds {change.min():+.3g} to {change.max():+.3g}' if n > 1 else 'in the one run'
    text = f'**Does PPO move the policy?** {answer[0].upper()}{answer[1:]}. {what}: {change.mean():+.3g}{unit} ({seeds}).'
    text += _nearness(rft)

    def draw(axes: Axes, before: np.ndarray = before, after: np.ndarray = after, key: str = key, sign: int = sign) -> None:
      for first, last in zip(before, after, strict=True):
        axes.plot(['before', 'after'], [first, last], 'o-', color=_COLORS[bool(sign * (last - first) > 0)])
      axes.set(xlim=(-0.3, 1.3), ylabel=key.replace('_', ' '), title='PPO, by seed')

    return Finding(text, draw)
  return None


def _nearness(rft: Mapping[str, Any]) -> str:
  """Return a sentence on how near the token frequencies are to the target's, which a lower NLL does not say; '' if not measured."""
  measured = {name: np.ravel(rft.get('comparison', {}).get(name, {}).get('divergence', ())) for name in ('start', 'ppo', 'sft')}
  if not all(values.size for values in measured.values()):
    return ''
  start, ppo, sft = (float(values.mean()) for values in measured.values())
  nearer = ('' if ppo < start else 'NOT ') + 'nearer to the target than the start, and ' + ('' if ppo < sft else 'NOT ')
  return f' It ends {nearer}nearer than supervised tuning: divergence of token frequencies {ppo:.3f}, {start:.3f} and {sft:.3f}.'


def _compute(scaling: Mapping[str, Any]) -> Finding | None:
  law = scaling.get('C')
  if not law:
    return None
  falls, fits = law['high'] < 0, law['r2'] >= _FITS_WELL
  answer = 'yes' if falls and fits else 'it falls, but not as a power law' if falls else 'not shown, the interval of the exponent has 0'
  held_out = {'': law.get('held_out'), ' with a floor': scaling.get('floored', {}).get('C', {}).get('held_out')}
  further = ''.join(
    f' The largest size is {"" if found["within"] else "NOT "}within its prediction from the others{form}.'
    for form, found in held_out.items()
    if found
  )
  text = (
    f'**Does loss follow compute?** {answer[0].upper()}{answer[1:]}: L(C) = {law["beta"]:.3g} C^{law["alpha"]:.4f} '
    f'[{law["low"]:.4f}, {law["high"]:.4f}], R2 {law["r2"]:.3f}, {law["n"]} points.{further}'
  )

  def draw(axes: Axes) -> None:
    bars = [[law['alpha'] - law['low']], [law['high'] - law['alpha']]]
    axes.errorbar([0], [law['alpha']], yerr=bars, fmt='o', color=_COLORS[falls], capsize=3)
    axes.axhline(0, color='black', linestyle=':', linewidth=1)
    axes.set(xticks=[], ylabel='exponent of the loss in FLOPs', title='compute')

  return Finding(text, draw)
