"""Code that was written for the client of the POLAR repository. Only the import is another one.

python examples/polar_client.py 127.0.0.1:30000
"""

import sys

# Instead of: from src.polar import RewardModelClient
from polar_jax.serve.adapters.polar import RewardModelClient

DATA = [
  {
    'prompt': [{'role': 'user', 'content': 'Name a prime number between 20 and 30.'}],
    'reference': [{'role': 'assistant', 'content': '23'}],
    'output': [{'role': 'assistant', 'content': output}],
  }
  for output in ('23', '29 is one.', '27')
]


def main(address: str) -> list[float]:
  client = RewardModelClient('internlm/POLAR-7B', server_type='sglang', server_address=address)
  rewards = client(client.encode(DATA))
  for example, reward in zip(DATA, rewards, strict=True):
    print(f'{reward:8.4f}  {example["output"][0]["content"]}')
  return rewards


if __name__ == '__main__':
  main(*sys.argv[1:])
