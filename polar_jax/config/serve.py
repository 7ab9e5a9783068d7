"""Settings of the reward server."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option


@dataclasses.dataclass(frozen=True)
class ServeConfig:
  """The reward server: its address, its limits, and how it computes."""

  host: str = option('127.0.0.1', 'Address to listen on. 0.0.0.0: all interfaces; then set token_env too.')
  port: int = option(30_000, 'Port to listen on. 0: any free one, written to server.json in the workdir.', min=0, max=65_535)
  token_env: str | None = option(
    None, 'Environment variable with the bearer token that requests must send, except to /health, /ready and the page. None: no token.'
  )
  model_name: str | None = option(None, 'Name of the model in replies. None: that of the folder of the checkpoint.')
  exact: bool = option(
    True, 'Compute each sequence alone, so that its reward has the same bits as in the score stage. False: pack densely, to about 1e-5.'
  )
  pooling_dialect: str = option('vllm', 'Server whose reply /pooling gives; the two cannot be told apart.', choices=('vllm', 'lmdeploy'))
  policy: str | None = option(
    None, 'Folder with the chat template of the policy, to recover prompts that OpenRLHF and slime send rendered. None: only plain ones.'
  )
  max_length: int | None = option(
    None, 'Longest sequence to compile for and to score, in tokens. None: template.max_length.', min=128, max=2**20
  )
  batch_tokens: int = option(32_768, 'Tokens given to the devices at a time, besides those that they compute.', min=128)
  queue_tokens: int = option(8_000_000, 'Tokens that may wait to be scored; further requests get 429.', min=1_000)
  max_sequences: int = option(16_384, 'Most candidates or texts of a request.', min=1)
  max_characters: int = option(1_000_000, 'Longest single text of a request, in characters.', min=1)
  max_body_mb: int = option(128, 'Largest body of a request, in MB, also after decompression.', min=1)
  body_memory_mb: int = option(1_024, 'Bodies of all requests that are being read, in MB; further requests get 429.', min=1)
  max_requests: int = option(4_096, 'Requests in progress; further ones get 429.', min=1)
  timeout: float = option(600.0, 'Longest time for a request, in seconds; X-Request-Timeout may ask for less.', exclusive_min=0)
  drain: float = option(60.0, 'Seconds that accepted requests get to finish after SIGTERM.', min=0)
  threads: int = option(4, 'Threads that parse and tokenize requests.', min=1)
