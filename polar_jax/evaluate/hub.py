"""Published files of benchmarks from the Hugging Face hub: data files alone, kept in its cache, and never code of a repository."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from polar_jax.runtime import json_files
from polar_jax.types import UserError

NAME = 'hub'  # as evaluate.folder
_PPE = ('MMLU-Pro', 'MATH', 'GPQA', 'IFEval', 'MBPP-Plus')
# Benchmark -> repositories of data sets.
REPOSITORIES = {
  'judgebench': ('ScalerLab/JudgeBench',),
  'ppe_correctness': tuple(f'lmarena-ai/PPE-{source}-Best-of-K' for source in _PPE),
  'rewardbench': ('allenai/reward-bench', 'allenai/pref-test-sets'),
  'rewardbench_2': ('allenai/reward-bench-2',),
  'rewardmath': ('RewardMATH/RewardMATH',),
  'rm_bench': ('THU-KEG/RM-Bench',),
}
# Benchmark -> the repository on GitHub that alone has its files, and what of it to copy.
_ELSEWHERE = {'rmb': ('Zhou-Zoey/RMB-Reward-Model-Benchmark', 'the folders of its RMB_dataset')}
_PATTERNS = ('*.parquet', '*.json', '*.jsonl', '*.jsonl.gz')


def download(benchmark: str) -> dict[str, pathlib.Path]:
  """Return the folders of a benchmark's files by repository, after downloading what is not in the cache.

  The name of a folder is the commit of its files.

  Args:
    benchmark: name of the folder that has its files where they are not from the hub.

  Raises:
    UserError: the hub does not have the benchmark or cannot be reached, or huggingface_hub is not installed.
  """
  if benchmark in _ELSEWHERE:
    repository, what = _ELSEWHERE[benchmark]
    raise UserError(
      f'{benchmark} is not on the hub, but in the GitHub repository {repository}: put {what} into DIR/{benchmark}, and set evaluate.folder '
      'to DIR'
    )
  snapshot = _snapshot_download()
  return {repository: _downloaded(snapshot, repository, benchmark) for repository in REPOSITORIES[benchmark]}


def _snapshot_download() -> Callable[..., str]:
  try:
    return importlib.import_module('huggingface_hub').snapshot_download
  except ModuleNotFoundError as error:
    raise UserError(f"evaluate.folder={NAME} needs huggingface_hub; run: pip install 'polar_jax[hub]'") from error


def _downloaded(snapshot: Callable[..., Any], repository: str, benchmark: str) -> pathlib.Path:
  try:
    return pathlib.Path(snapshot(repository, repo_type='dataset', allow_patterns=list(_PATTERNS)))
  except Exception as error:  # of huggingface_hub, of the libraries for HTTP that its versions use, or of the disk
    names = REPOSITORIES[benchmark]
    several = f' (for each NAME of {", ".join(names)})' if len(names) > 1 else ''
    name, place = ('NAME', f'DIR/{benchmark}/NAME') if several else (repository, f'DIR/{benchmark}')
    raise UserError(
      f'{repository} cannot be downloaded ({json_files.shorten(error)}); where the hub can be reached, run: hf download {name} '
      f'--repo-type dataset --local-dir {place}{several}; then copy DIR here, and set evaluate.folder to it'
    ) from error
