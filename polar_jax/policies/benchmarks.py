"""The twenty benchmarks of policies in the paper, with their names in lm-eval and OpenCompass.

The paper ran OpenCompass; which of its configs is not published, so those of its default lists are named. The prompts, the number of
examples and the rules of lm-eval are others: its numbers are comparable among themselves, not with those of the paper.
"""

from __future__ import annotations

from typing import NamedTuple

JUDGE = 'another model judges the responses'
SANDBOX = 'the code of the responses is run'


class Benchmark(NamedTuple):
  """A benchmark.

  Attributes:
    name: in `evaluate.tasks`.
    title: for people.
    opencompass: its config there, and the metric.
    task: task or group of lm-eval; None if it has none.
    metric: the main one, with the filter after a comma, as in lm-eval's results.
    shots: examples in the prompt.
    needs: what scoring needs besides the responses; '' for nothing.
    note: how the task differs from that of OpenCompass.
    answer: field of lm-eval's documents with an answer that the rule `last_number` can read; None if there is none.
  """

  name: str
  title: str
  opencompass: tuple[str, str]
  task: str | None = None
  metric: str = ''
  shots: int = 0
  needs: str = ''
  note: str = ''
  answer: str | None = None


TWENTY = (
  Benchmark('alignbench', 'AlignBench', ('alignbench (judgeby_critiquellm)', 'score, 1-10'), needs=JUDGE),
  Benchmark('alpacaeval', 'AlpacaEval 2', ('alpaca_eval (alpacav2_judgeby_gpt4)', 'win rate against GPT-4-turbo'), needs=JUDGE),
  Benchmark('arena_hard', 'Arena-Hard', ('arena_hard', 'win rate against GPT-4-0314, both orders'), needs=JUDGE),
  Benchmark('wildbench', 'WildBench', ('wildbench (pair)', 'reward against three models'), needs=JUDGE),
  Benchmark('mtbench', 'MT-Bench', ('mtbench (single judge)', 'score, 1-10'), needs=JUDGE),
  Benchmark('followbench', 'FollowBench', ('followbench_llmeval', 'hard and soft satisfaction'), needs=JUDGE),
  Benchmark('fofo', 'FoFo', ('fofo_judge', 'share of right formats'), needs=JUDGE),
  Benchmark(
    'humaneval',
    'HumanEval',
    ('humaneval_openai_sample_evals_gen_dcae0e', 'humaneval_pass@1'),
    task='humaneval_instruct',
    metric='pass@1,create_test',
    needs=SANDBOX,
  ),
  Benchmark(
    'mbpp',
    'MBPP',
    ('sanitized_mbpp_mdblock_gen_a447ff', 'score'),
    task='mbpp_instruct',
    metric='pass_at_1,extract_code',
    shots=3,
    needs=SANDBOX,
    note='all problems, not the sanitized ones',
  ),
  Benchmark('drop', 'DROP', ('drop_openai_simple_evals_gen_3857b0', 'accuracy'), task='drop', metric='f1,none', shots=3),
  Benchmark('bbh', 'BBH', ('bbh_gen_ee62e9', 'naive average'), task='bbh_cot_fewshot', metric='exact_match,get-answer', shots=3),
  Benchmark(
    'gpqa_diamond',
    'GPQA diamond',
    ('gpqa_openai_simple_evals_gen_5aeece', 'accuracy'),
    task='gpqa_diamond_cot_zeroshot',
    metric='exact_match,flexible-extract',
    note='its data are given to those who accept their terms',
  ),
  Benchmark(
    'hellaswag',
    'HellaSwag',
    ('hellaswag_10shot_gen_e42710', 'accuracy'),
    task='hellaswag',
    metric='acc_norm,none',
    shots=10,
    note='by likelihood, not by a generated letter',
  ),
  Benchmark(
    'musr', 'MuSR', ('musr_gen_b47fd3', 'average of three subsets'), task='leaderboard_musr', metric='acc_norm,none', note='by likelihood'
  ),
  Benchmark('korbench', 'KOR-Bench', ('korbench_single_0_shot', 'accuracy')),
  Benchmark(
    'gsm8k',
    'GSM8K',
    ('gsm8k_0shot_v2_gen_a58960', 'accuracy'),
    task='gsm8k',
    metric='exact_match,flexible-extract',
    shots=5,
    answer='answer',
  ),
  Benchmark(
    'math_500',
    'MATH-500',
    ('math_500_gen', 'accuracy by math-verify'),
    task='minerva_math500',
    metric='math_verify,none',
    shots=4,
    answer='answer',
  ),
  Benchmark(
    'cmmlu', 'CMMLU', ('cmmlu_0shot_cot_gen_305931', 'average'), task='cmmlu', metric='acc,none', note='by likelihood, without reasoning'
  ),
  Benchmark(
    'mmlu_pro', 'MMLU-Pro', ('mmlu_pro_0shot_cot_gen_08c1de', 'average'), task='mmlu_pro', metric='exact_match,custom-extract', shots=5
  ),
  Benchmark(
    'mmmlu_lite',
    'MMMLU-lite',
    ('openai_mmmlu_lite_gen_c51a84', 'average'),
    task='mmmlu',
    metric='acc,none',
    note='all of MMMLU, by likelihood, not the sample of it',
  ),
)

BY_NAME = {benchmark.name: benchmark for benchmark in TWENTY}


def obstacle(benchmark: Benchmark, run_code: bool) -> str | None:
  """Return why a benchmark is not run with lm-eval; None if it can be.

  Args:
    benchmark: one of the table.
    run_code: whether the code of responses may be run on this machine.
  """
  if benchmark.needs == JUDGE:
    return f'{JUDGE}: run {benchmark.opencompass[0]} of OpenCompass'
  if benchmark.task is None:
    return f'lm-eval has no such task: run {benchmark.opencompass[0]} of OpenCompass'
  if benchmark.needs == SANDBOX and not run_code:
    return f'{SANDBOX}: in a sandbox, allow it with evaluate.run_code=True'
  return None
