"""Sections of report.md on accuracy, training and the tools, from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.evaluate import baselines as baselines_lib
from polar_jax.evaluate import clusters as clusters_lib
from polar_jax.report import markdown, surveyed

SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')
ARMS = ('pretrained_finetuned', 'finetuned_only', 'finetuned_without_reference', 'pretrained_only', 'finetuned_at_equal_compute')
TRAINING = ('pretrain_lm', 'pretrain', 'finetune')
STAGES = ('synthesize', *TRAINING, 'evaluate')
TOOLS = ('convert', 'score')
_FEW_EXAMPLES = 300  # with fewer, a 95% interval is wider than about 11 points
_ARM_MEANING = {
  'pretrained_finetuned': 'contrastive pre-training, then fine-tuning on preferences',
  'finetuned_only': 'fine-tuning without contrastive pre-training',
  'finetuned_without_reference': 'the same with the reference hidden: a classic reward model',
  'pretrained_only': 'contrastive pre-training without fine-tuning',
  'finetuned_at_equal_compute': 'fine-tuning alone, on as many tokens as the first arm reads in all',
}
_SHARED = {
  'policy': 'the policy of their reference',
  'prompt': 'a prompt',
  'example': 'nothing',
}
_PLURAL = {'policy': 'policies', 'prompt': 'prompts', 'example': 'examples'}


def overview(results: Mapping[str, Any]) -> str:
  """Return the introduction: which results there are, which are missing, and how to read them."""
  expected = {
    'language-model pre-training': results.get('pretrain_lm'),
    'contrastive pre-training': results.get('pretrain'),
    'policy discrimination': results.get('evaluate', {}).get('by_split'),
    'baselines on the same triplets': results.get('evaluate', {}).get('baselines'),
    'fine-tuning on preferences': results.get('finetune', {}).get('arms'),
    'timing': results.get('timing'),
    'environment': results.get('environment'),
  }
  present = [name for name, value in expected.items() if value]
  missing = [name for name, value in expected.items() if not value]
  lines = [f'Results: {", ".join(present) or "none"}.']
  if missing:
    lines.append(f'Missing (not run, or not recorded): {", ".join(missing)}.')
  lines.append(
    'Accuracy is the share of examples whose chosen trajectory scores above the rejected one; a tie counts half, and chance is 50%. '
    'Brackets hold 95% intervals. All numbers are also in `report.json`, as fractions.'
  )
  return '\n'.join(lines)


def policies(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return the section on policy discrimination, from the section `evaluate` of report.json."""
  evaluate = results.get('evaluate', {})
  by_split, baselines = evaluate.get('by_split', {}), evaluate.get('baselines', {})
  splits = markdown.ordered({**by_split, **{s: 0 for b in baselines.values() for s in b}}, SPLITS)
  if not splits:
    return []
  body = [['**pre-trained model**', *(accuracy(by_split.get(s)) for s in splits)]] if by_split else []
  body += [[_baseline_name(name), *(accuracy(baselines[name].get(s)) for s in splits)] for name in _baseline_order(baselines)]
  first = [by_split] if by_split else list(baselines.values())
  intervals = {s: next((source[s] for source in first if s in source), None) for s in splits}
  out = [
    '## Policy discrimination',
    'Chosen and reference are two samples of one policy; rejected is a sample of another. Accuracy in %.',
    markdown.table(['', *(_with_size(s, intervals[s]) for s in splits)], body),
  ]
  out += clustering({s: interval for s, interval in intervals.items() if interval})
  out += markdown.figure(figures, 'accuracy', 'Accuracy by split, with 95% intervals')
  out += surveyed.section(evaluate.get('examples', {}))
  margins = evaluate.get('margin_over_best_baseline', {})
  sentences = []
  for split in splits:
    if split in margins:
      sentences.append(f'{markdown.escape(split)}: {verdict("the model", margins[split])}')
    elif split in by_split:
      sentences.append(f'{markdown.escape(split)}: no paired comparison with the baselines was recorded.')
  return [*out, markdown.bullets(sentences)] if sentences else out


def preferences(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return the section on preferences, from the section `finetune` of report.json."""
  finetune = results.get('finetune', {})
  arms, baselines, categories = (finetune.get(key, {}) for key in ('arms', 'baselines', 'by_category'))
  out = []
  if arms or baselines:
    out += ['## Preferences', 'Accuracy in % on held-out preferences.', _arm_table(finetune)]
    if finetune.get('margin_over_arms'):
      out.append(
        f'`{ARMS[0]}` minus: paired difference in points between `{ARMS[0]}` and the arm of the line, on the same examples; '
        'positive if the arm of the line is less accurate.'
      )
    seeds = max((len(arm.get('by_seed', [0])) for arm in arms.values()), default=1)
    out += [f'Means over up to {seeds} seeds of fine-tuning; the intervals are over clusters, not seeds.'] if seeds > 1 else []
    out += clustering({'preferences': next(iter([*arms.values(), *baselines.values()]))})
    out += surveyed.section(finetune.get('examples', {}))
    out += markdown.figure(figures, 'arms', 'Preference accuracy by arm, with 95% intervals')
    main = arms.get(ARMS[0])
    comparable = {name: v for name, v in baselines.items() if name not in baselines_lib.NOT_HEURISTICS}
    if 'margin_over_best_baseline' in finetune:
      out.append(f'On preferences, {verdict("the fine-tuned model", finetune["margin_over_best_baseline"])}')
    elif main and comparable:
      out.append(_unpaired_verdict(main, comparable))
  if categories:
    body = [[markdown.escape(name), accuracy(v), f'{v["n"]:,}', _cluster_count(v)] for name, v in sorted(categories.items())]
    out += ['### By category', markdown.table(['category', 'accuracy, %', 'n', 'clusters'], body)]
    few = [markdown.escape(name) for name, v in sorted(categories.items()) if v['n'] < _FEW_EXAMPLES]
    if few:
      out.append(f'Categories with fewer than {_FEW_EXAMPLES} examples, too few for conclusions about one category: {", ".join(few)}.')
    out += _few_clusters(categories)
  return out


def _arm_table(finetune: Mapping[str, Any]) -> str:
  arms, baselines, margins = (finetune.get(key, {}) for key in ('arms', 'baselines', 'margin_over_arms'))
  lines = [(f'**{markdown.escape(a)}**', _ARM_MEANING.get(a, ''), arms[a], margins.get(a)) for a in markdown.ordered(arms, ARMS)]
  lines += [(_baseline_name(name), '', baselines[name], None) for name in _baseline_order(baselines)]
  head = ['', 'meaning', 'accuracy, %', *([f'`{ARMS[0]}` minus'] if margins else []), 'n', 'clusters']
  body = [
    [name, meaning, accuracy(v), *([_points(margin)] if margins else []), f'{v["n"]:,}', _cluster_count(v)]
    for name, meaning, v, margin in lines
  ]
  return markdown.table(head, body)


def training(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return the section on the training runs."""
  runs = {s: results.get(s, {}) for s in TRAINING} | results.get('finetune', {}).get('runs', {})
  scalars = {s: {k: v for k, v in run.items() if not isinstance(v, (dict, list))} for s, run in runs.items()}
  mfu_rules = sorted({str(run.pop('mfu_rule')) for run in scalars.values() if 'mfu_rule' in run})
  stages = [s for s in scalars if scalars[s]]
  if not stages and 'loss' not in figures:
    return []
  out = ['## Training']
  if stages:
    keys = markdown.ordered({k: 0 for s in stages for k in scalars[s]}, ('steps', 'tokens', 'loss', 'accuracy'))
    body = [[markdown.escape(key), *(markdown.text(scalars[s][key]) if key in scalars[s] else '-' for s in stages)] for key in keys]
    out.append(markdown.table(['', *map(markdown.escape, stages)], body))
  out += [f'How `mfu` is computed: {markdown.escape(rule)}.' for rule in mfu_rules]
  out += surveyed.section({f'{stage}, {split}': found for stage in stages for split, found in runs[stage].get('examples', {}).items()})
  return out + markdown.figure(figures, 'loss', 'Loss and accuracy during training; the dashed lines are chance')


def tools(results: Mapping[str, Any]) -> list[str]:
  """Return a section for each stage that does not train."""
  out = []
  for tool in TOOLS:
    if results.get(tool):
      body = [[markdown.escape(key), markdown.text(value)] for key, value in results[tool].items()]
      out += [f'## Stage {tool}', markdown.table(['', ''], body)]
  return out


def time_and_environment(results: Mapping[str, Any]) -> list[str]:
  """Return the sections on seconds per stage and on versions and hardware."""
  out = []
  if results.get('timing'):
    seconds = results['timing']
    stages = [
      *(s for s in markdown.ordered(seconds, (*STAGES, 'rft', 'sweep', 'fit', *TOOLS)) if s != 'total'),
      *(['total'] if 'total' in seconds else []),
    ]
    out += ['## Time', markdown.table(['stage', 'seconds'], [[markdown.escape(s), f'{seconds[s]:.1f}'] for s in stages])]
  if results.get('environment'):
    body = [[markdown.escape(k), markdown.text(v)] for k, v in sorted(results['environment'].items())]
    out += ['## Environment', markdown.table(['', ''], body)]
  return out


def limitations(results: Mapping[str, Any]) -> list[str]:
  """Return the section on what the numbers do not show."""
  evaluate, finetune = results.get('evaluate', {}), results.get('finetune', {})
  lines = [
    'Intervals are percentile bootstrap intervals. They do not cover the choice of seed: each number comes from a single training run.',
    'If every example of a set is right, or every one wrong or a tie, the bootstrap sees no spread; the interval is then the exact one of '
    'Clopper and Pearson, with clusters as its trials.',
  ]
  counts = [v['n'] for part in (evaluate.get('by_split', {}), finetune.get('arms', {})) for v in part.values()]
  if counts:
    examples = f'{counts[0]:,}' if len(set(counts)) == 1 else f'{min(counts):,} to {max(counts):,}'
    lines.insert(0, f'Each accuracy of a model is a mean over {examples} examples.')
  if evaluate.get('baselines') or finetune.get('baselines'):
    lines.append(
      'The best baseline is chosen in hindsight on the examples it is compared on, which on average understates the margin of the model.'
    )
  if any('bayes' in part.get('baselines', {}) for part in (evaluate, finetune)):
    lines.append(
      'The Bayes-optimal discriminator knows the exact likelihood of every text under every policy of the pool, which no learner does.'
    )
  if losses := evaluate.get('bayes_loss'):
    lines.append(f'Its loss is {", ".join(f"{value:.4f} ({split})" for split, value in losses.items())} nats: no model can be below.')
  lines.append(
    'Examples made by the synthesize stage come from small n-gram policies: such numbers check the method and say nothing about '
    'large language models.'
  )
  return ['## Limitations', markdown.bullets(lines)]


def clustering(intervals: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Return paragraphs on what the intervals resample, with a warning if that is few. One interval stands for each set of examples."""
  known = {name: v for name, v in intervals.items() if 'clustered_by' in v}
  if not known:
    return ['It was not recorded whether intervals resample clusters of examples; if not, they may be too narrow.']
  out = []
  for by in dict.fromkeys(v['clustered_by'] for v in known.values()):
    counts = {name: v['clusters'] for name, v in known.items() if v['clustered_by'] == by}
    listed = ', '.join(f'{count:,} on {markdown.escape(name)}' for name, count in counts.items())
    if by == 'example':
      out.append(f'Intervals resample single examples ({listed}), because no two of them share a known policy or a prompt.')
    else:
      out.append(
        f'Intervals resample {_PLURAL.get(by, by)} ({listed}): examples that share {_SHARED.get(by, by)} are not independent and are '
        'drawn together.'
      )
  return out + _few_clusters(known)


def _few_clusters(intervals: Mapping[str, Mapping[str, Any]]) -> list[str]:
  few = {name: v['clusters'] for name, v in intervals.items() if v.get('clusters', clusters_lib.FEW) < clusters_lib.FEW}
  if not few:
    return []
  listed = ', '.join(f'{markdown.escape(name)}: {count}' for name, count in few.items())
  return [f'**Warning: fewer than {clusters_lib.FEW} clusters** ({listed}). These intervals are likely too narrow.']


def _with_size(split: str, interval: Mapping[str, Any] | None) -> str:
  if interval is None:
    return markdown.escape(split)
  clustered = '' if interval.get('clustered_by', 'example') == 'example' else f'; {_cluster_count(interval)}'
  return f'{markdown.escape(split)} (n = {interval["n"]:,}{clustered})'


def _cluster_count(interval: Mapping[str, Any]) -> str:
  if 'clusters' not in interval:
    return '-'
  by = interval['clustered_by']
  return f'{interval["clusters"]:,} {by if interval["clusters"] == 1 else _PLURAL.get(by, by)}'


def verdict(who: str, margin: Mapping[str, Any]) -> str:
  """Return one exact sentence about a paired margin."""
  points, low, high = (100 * margin[key] for key in ('difference', 'low', 'high'))
  baseline, interval = f'the best baseline (`{margin["baseline"]}`)', f'(95% interval {low:+.1f} to {high:+.1f})'
  if margin['low'] > 0:
    return f'{who} beats {baseline} by {points:.1f} points {interval}.'
  if margin['difference'] > 0:
    return f'{who} is not shown to beat {baseline}: it is {points:.1f} points ahead, but the interval includes 0 {interval}.'
  behind = 'level with it' if margin['difference'] == 0 else f'{-points:.1f} points behind'
  return f'{who} does NOT beat {baseline}: it is {behind} {interval}.'


def _unpaired_verdict(main: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> str:
  best = max(sorted(baselines), key=lambda name: baselines[name]['accuracy'])
  points = 100 * (main['accuracy'] - baselines[best]['accuracy'])
  start = f'On preferences, the fine-tuned model ({100 * main["accuracy"]:.1f}%)'
  baseline = f'the best baseline (`{best}`, {100 * baselines[best]["accuracy"]:.1f}%)'
  if points > 0:
    return f'{start} is {points:.1f} points above {baseline}; no paired interval of this difference was recorded.'
  return f'{start} does NOT beat {baseline}.'


def _baseline_order(baselines: Mapping[str, Any]) -> list[str]:
  """Return the names: heuristics in alphabetical order, then the coin flip, then the Bayes-optimal discriminator."""
  return sorted(baselines, key=lambda name: (name == 'bayes', name == 'random', name))


def _baseline_name(name: str) -> str:
  return {'bayes': 'Bayes-optimal', 'random': 'coin flip (`random`)'}.get(name, f'heuristic `{name}`')


def accuracy(value: Mapping[str, Any] | None) -> str:
  return '-' if value is None else f'{100 * value["accuracy"]:.1f} [{100 * value["low"]:.1f}, {100 * value["high"]:.1f}]'


def _points(margin: Mapping[str, Any] | None) -> str:
  return '-' if margin is None else f'{100 * margin["difference"]:+.1f} [{100 * margin["low"]:+.1f}, {100 * margin["high"]:+.1f}]'
