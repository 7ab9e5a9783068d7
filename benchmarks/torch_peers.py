"""The same reward model in torch, in a plain training loop and in TRL's RewardTrainer. Needs the extra `bench`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_llama
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl import RewardConfig, RewardTrainer

from polar_jax.config import ModelConfig

LEARNING_RATE, CLIP_NORM = 1e-5, 1.0


def make_model(config: ModelConfig, params: dict[str, Any]) -> LlamaForSequenceClassification:
  """Return a Llama reward model with our parameters: float32, no dropout, no gradient checkpointing."""
  model = LlamaForSequenceClassification(torch_llama.llama_config(config, num_labels=1, pad_token_id=0, use_cache=False)).float()
  torch_llama.load(model, config, params, {'score.weight': params['v_head'][None]})
  return model


def scorer(model: LlamaForSequenceClassification, rows: np.ndarray) -> Callable[[], None]:
  """Return a function that scores sequences of token ids in one batch."""
  tokens = torch.tensor(rows).long()

  def score() -> None:
    with torch.inference_mode():
      model(input_ids=tokens)

  return score


class PlainLoop:
  """Forward, backward, clipping and AdamW on the two sequences of every pair."""

  def __init__(self, model: LlamaForSequenceClassification, chosen: np.ndarray, rejected: np.ndarray):
    self._model, self._pairs = model, len(chosen)
    self._tokens = torch.tensor(np.concatenate([chosen, rejected])).long()
    self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

  def step(self) -> float:
    """Run one step and return its loss."""
    rewards = self._model(input_ids=self._tokens).logits[:, 0]
    loss = torch.nn.functional.softplus(rewards[self._pairs :] - rewards[: self._pairs]).mean()
    self._optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
    self._optimizer.step()
    return float(loss.detach())


class _StepTimes(TrainerCallback):
  def __init__(self) -> None:
    self.seconds: list[float] = []

  def on_step_begin(self, *_: Any, **__: Any) -> None:
    self._started = time.perf_counter()

  def on_step_end(self, *_: Any, **__: Any) -> None:
    self.seconds.append(time.perf_counter() - self._started)


class Trl:
  """TRL's RewardTrainer on the same pairs. By default it uses bfloat16 and gradient checkpointing, and drops long examples."""

  def __init__(self, model: LlamaForSequenceClassification, chosen: np.ndarray, rejected: np.ndarray, folder: str):
    words = Tokenizer(WordLevel({'<pad>': 0, '<eos>': 1}, unk_token='<pad>'))  # the examples are token ids already
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>', eos_token='<eos>')
    settings = RewardConfig(
      output_dir=folder,
      per_device_train_batch_size=len(chosen),
      max_steps=1,
      max_length=None,
      learning_rate=LEARNING_RATE,
      lr_scheduler_type='constant',
      max_grad_norm=CLIP_NORM,
      bf16=False,
      gradient_checkpointing=False,
      disable_dropout=True,
      use_cpu=True,
      report_to=[],
      save_strategy='no',
      logging_strategy='no',
      disable_tqdm=True,
      seed=0,
    )
    rows = Dataset.from_dict({'chosen_ids': chosen.tolist(), 'rejected_ids': rejected.tolist()})
    self._times = _StepTimes()
    self._trainer = RewardTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[self._times])

  def step(self) -> float:
    """Run one step and return its seconds, without the start of the trainer and the fetching of the batch."""
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      self._trainer.train()
    return self._times.seconds[-1]
