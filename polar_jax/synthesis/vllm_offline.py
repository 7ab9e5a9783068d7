"""Policies that vLLM samples in this process, without a server: for clusters, with the backend ray, whose actors keep it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from polar_jax.config import ConfigError
from polar_jax.runtime import json_files
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, QuarantineError, Request, Sample


class VllmSampler:
  """A model of vLLM. With `chat` a prompt is the message of a user, which the model's chat template renders."""

  def __init__(self, spec: PolicySpec):
    """Load the model.

    Raises:
      ConfigError: vLLM is not installed.
      QuarantineError: it cannot load the model.
    """
    if importlib.util.find_spec('vllm') is None:
      raise ConfigError(
        f'policy {spec.name!r} is of kind vllm, and vLLM is not installed; install it where the policy is sampled, or serve '
        'the model elsewhere and make it kind openai'
      )
    import vllm

    self._vllm, self._spec, self._requests, self._tokens, self._prompt_tokens = vllm, spec, 0, 0, 0
    try:
      self._model = vllm.LLM(model=spec.settings['model'], **spec.settings.get('engine', {}))
    except Exception as error:  # vLLM, torch and the hub each raise their own
      raise QuarantineError(f'vLLM cannot load {spec.settings["model"]} ({json_files.shorten(error)}); correct model or engine') from error

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request, in order."""
    spec, settings = self._spec, self._spec.settings
    sampling = [
      self._vllm.SamplingParams(
        temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k or 0, max_tokens=spec.max_tokens, seed=request.seed
      )
      for request in requests
    ]
    texts = [request.prompt.text for request in requests]
    try:
      if settings.get('chat'):
        system = [{'role': 'system', 'content': settings['system']}] if settings.get('system') else []
        messages = [[*system, {'role': 'user', 'content': text}] for text in texts]
        outputs = self._model.chat(messages, sampling, use_tqdm=False)
      else:
        outputs = self._model.generate(texts, sampling, use_tqdm=False)
    except Exception as error:
      raise QuarantineError(f'vLLM failed ({json_files.shorten(error)}); shorten the prompts, or raise max_model_len in engine') from error
    self._requests += len(requests)
    return [self._sample(output) for output in outputs]

  def counts(self) -> dict[str, Any]:
    """Return the numbers of requests and tokens."""
    return {'requests': self._requests, 'tokens': self._tokens, 'prompt_tokens': self._prompt_tokens}

  def _sample(self, output: Any) -> Sample:
    answer = output.outputs[0]
    self._tokens += len(answer.token_ids)
    self._prompt_tokens += len(output.prompt_token_ids or ())
    return Sample(answer.text, answer.finish_reason != 'length', len(answer.token_ids))
