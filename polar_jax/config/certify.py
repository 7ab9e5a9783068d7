"""Settings of the certificate of a reward model's serving."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option


@dataclasses.dataclass(frozen=True)
class CertifyConfig:
  """Compares the rewards of a model computed here, by our server, by transformers and by other servers."""

  polar: str | None = option(None, 'Address of a running server of the stage serve with the same model, as HOST:PORT or a URL. None: none.')
  vllm: str | None = option(None, 'Address of a running vLLM server of the exported model. None: none.')
  sglang: str | None = option(None, 'Address of a running SGLang server of the exported model. None: none.')
  lmdeploy: str | None = option(None, 'Address of a running LMDeploy server of the exported model. None: none.')
  server_model: str | None = option(None, 'Name of the model on those servers. None: the last part of `checkpoint`.')
  transformers: bool = option(True, 'Compare with transformers on a CPU, if it and torch are installed.')
  tolerance: float = option(
    1e-3, 'Largest difference of two rewards that still holds. Exact ways must have the same bits, whatever it is.', exclusive_min=0
  )
