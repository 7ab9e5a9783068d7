"""The policy pool of the paper, by the names of its models on the Hugging Face hub: for --config.synthesize.pool=configs/pool_polar.py.

Section 3.1 and Table 5 of the paper name the families and the range of sizes: 53 base models, 53 chat models and 78 checkpoints of the
pre-training of InternLM3-8B, which are not published. Listed are the models of these families that are; the Yi-200K models have no chat
versions. Sampling is the paper's: temperature 1, top-p 0.9, top-k 50, at most 4,096 tokens.

Every policy is sampled by vLLM in the process of a worker, on a Ray cluster whose nodes have GPUs:

  python -m polar_jax.main --config=configs/synthesize.py --config.synthesize.pool=configs/pool_polar.py
      --config.synthesize.prompts=documents.jsonl,instructions.jsonl --config.synthesize.prompt_weights=3.56,0.04
      --config.synthesize.max_prompts=1_000_000 --config.synthesize.backend=ray --config.synthesize.gpus=1

Tensor parallelism for the large ones is an engine argument: {'tensor_parallel_size': 4}, with synthesize.gpus=4. Policies that a server
already serves can be of kind `openai` instead.
"""

from __future__ import annotations

# Family, date of the release, organization, and (base model, chat model, billions of parameters) of each size.
FAMILIES = [
  (
    'llama-3',
    '2024-04',
    'meta-llama',
    [
      ('Meta-Llama-3-8B', 'Meta-Llama-3-8B-Instruct', 8),
      ('Meta-Llama-3-70B', 'Meta-Llama-3-70B-Instruct', 70),
    ],
  ),
  (
    'llama-3.1',
    '2024-07',
    'meta-llama',
    [
      ('Llama-3.1-8B', 'Llama-3.1-8B-Instruct', 8),
      ('Llama-3.1-70B', 'Llama-3.1-70B-Instruct', 70),
    ],
  ),
  (
    'llama-3.2',
    '2024-09',
    'meta-llama',
    [
      ('Llama-3.2-1B', 'Llama-3.2-1B-Instruct', 1),
      ('Llama-3.2-3B', 'Llama-3.2-3B-Instruct', 3),
    ],
  ),
  (
    'qwen',
    '2023-12',
    'Qwen',
    [
      *((f'Qwen-{name}', f'Qwen-{name}-Chat', size) for name, size in (('1_8B', 1.8), ('7B', 7), ('14B', 14), ('72B', 72))),
    ],
  ),
  (
    'qwen1.5',
    '2024-02',
    'Qwen',
    [
      *((f'Qwen1.5-{size:g}B', f'Qwen1.5-{size:g}B-Chat', size) for size in (0.5, 1.8, 4, 7, 14, 32, 72)),
    ],
  ),
  (
    'qwen2',
    '2024-06',
    'Qwen',
    [
      *((f'Qwen2-{size:g}B', f'Qwen2-{size:g}B-Instruct', size) for size in (0.5, 1.5, 7, 72)),
    ],
  ),
  (
    'qwen2.5',
    '2024-09',
    'Qwen',
    [
      *((f'Qwen2.5-{size:g}B', f'Qwen2.5-{size:g}B-Instruct', size) for size in (0.5, 1.5, 3, 7, 14, 32, 72)),
    ],
  ),
  (
    'yi',
    '2023-11',
    '01-ai',
    [
      ('Yi-6B', 'Yi-6B-Chat', 6),
      ('Yi-34B', 'Yi-34B-Chat', 34),
      ('Yi-6B-200K', None, 6),
      ('Yi-9B-200K', None, 9),
      ('Yi-34B-200K', None, 34),
    ],
  ),
  (
    'yi-1.5',
    '2024-05',
    '01-ai',
    [
      *((f'Yi-1.5-{size}B', f'Yi-1.5-{size}B-Chat', size) for size in (6, 9, 34)),
    ],
  ),
  ('chatglm3', '2023-10', 'THUDM', [('chatglm3-6b-base', 'chatglm3-6b', 6)]),
  ('glm-4', '2024-06', 'THUDM', [('glm-4-9b', 'glm-4-9b-chat', 9)]),
  (
    'deepseek',
    '2023-11',
    'deepseek-ai',
    [
      *((f'deepseek-llm-{size}b-base', f'deepseek-llm-{size}b-chat', size) for size in (7, 67)),
    ],
  ),
  (
    'gemma',
    '2024-02',
    'google',
    [
      *((f'gemma-{size}b', f'gemma-{size}b-it', size) for size in (2, 7)),
    ],
  ),
  (
    'internlm',
    '2023-07',
    'internlm',
    [
      *((f'internlm-{size}b', f'internlm-chat-{size}b', size) for size in (7, 20)),
    ],
  ),
  (
    'internlm2',
    '2024-01',
    'internlm',
    [
      *((f'internlm2-{name}', f'internlm2-chat-{name}', size) for name, size in (('1_8b', 1.8), ('7b', 7), ('20b', 20))),
    ],
  ),
  (
    'internlm2.5',
    '2024-07',
    'internlm',
    [
      *((f'internlm2_5-{name}', f'internlm2_5-{name}-chat', size) for name, size in (('1_8b', 1.8), ('7b', 7), ('20b', 20))),
    ],
  ),
]


def get_pool():
  policies = []
  for family, date, organization, models in FAMILIES:
    for base, chat, size in models:
      for name, is_chat in ((base, False), (chat, True)):
        if name is not None:
          about = {'family': family, 'date': date, 'size': size, 'chat': is_chat}
          policies.append({'name': name, 'kind': 'vllm', 'model': f'{organization}/{name}', **about})
  return {'policies': policies, 'defaults': {'temperature': 1.0, 'top_p': 0.9, 'top_k': 50, 'max_tokens': 4096}}
