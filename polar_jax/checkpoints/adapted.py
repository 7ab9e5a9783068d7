"""Checkpoints that hold adapters alone: runs of this project and folders of PEFT. Opening one opens its base as well."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer, checksums, importer, peft
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained, output_settings, start_params
from polar_jax.config import ConfigError, LoraConfig, ModelConfig, check_adapters
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model import heads, lora
from polar_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Adapted(Pretrained):
  """A checkpoint that has adapters, and the scalar head if there is one, alone. Its parameters are merged with those of its base.

  Attributes:
    lora: of the adapters.
    base: the checkpoint that they were trained on.
    base_digest: of its parameters; None: not known.
    tensors: of a folder of PEFT; None for a run.
  """

  lora: LoraConfig = LoraConfig()
  base: Pretrained = dataclasses.field(kw_only=True)
  base_digest: str | None = None
  tensors: peft.Tensors | None = None

  def params(
    self, mesh: Mesh, dtype: str | None = None, *, head: str | None = None, on_tensor: importer.OnTensor | None = None
  ) -> dict[str, Any]:
    merged = lora.merge(lora.join(self.trained(mesh), self._frozen(mesh)), self.lora, dtype)
    return merged if head in (None, self.head) else {'decoder': merged['decoder']}

  def trained(self, mesh: Mesh) -> dict[str, Any]:
    """Return the adapters, and the scalar head if the model has one, on the mesh, float32."""
    abstract = sharding.abstract_params(heads.abstract_model(self.model, self.head, self.lora), mesh)
    wanted, _ = lora.split(abstract, self.lora)
    if self.tensors is None:
      return checkpointer.load_params(self.path, wanted, as_stored=True)
    arrays = self.tensors.params(wanted['decoder']['layers']['lora'])
    if 'v_head' in wanted and 'v_head' not in arrays:
      arrays['v_head'] = self.base.head_params(mesh, 'float32', self.head)['v_head']
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), arrays, wanted)

  def digest(self, frozen: dict[str, Any]) -> str:
    """Return what identifies the merged parameters: base and adapters, because sums that are rounded differ from device to device."""
    mesh = jax.tree.leaves(frozen)[0].sharding.mesh
    of_base = self.base_digest or self.base.digest(self._frozen(mesh))
    own = checksums.of_arrays(self.trained(mesh)['decoder'])
    return f'{frozen["decoder"]["norm"].dtype}:{checksums.digest([of_base, lora.scale(self.lora), own])}'

  def _frozen(self, mesh: Mesh) -> dict[str, Any]:
    """Return the parameters of the base, without a scalar head.

    Raises:
      ConfigError: they are not those that the adapters were trained on.
    """
    dtype = self.base_digest.partition(':')[0] if self.base_digest else None
    frozen = {name: value for name, value in self.base.params(mesh, dtype, head=self.head).items() if name != 'v_head'}
    if self.base_digest and self.base.digest(frozen) != self.base_digest:
      raise ConfigError(f'{self.path}: its adapters were trained on other parameters than those in {self.base.path}: restore that base')
    return lora.freeze(frozen, self.lora)

  @functools.cached_property
  def assets(self) -> pathlib.Path:
    return self.base.assets if self.tensors else super().assets

  @property
  def has_tokenizer(self) -> bool:
    return self.base.has_tokenizer if self.tensors else super().has_tokenizer

  def tokenizer(self) -> Tokenizer:
    return self.base.tokenizer() if self.tensors else super().tokenizer()


def open_run(opened: Pretrained) -> Adapted:
  """Return a run whose checkpoints hold adapters, with its base opened.

  Raises:
    ConfigError: the base does not exist, or has another shape.
  """
  settings = opened.settings
  section = 'lora.' if 'lora.rank' in settings else 'rft.lora.'
  stored = {f.name: settings[section + f.name] for f in dataclasses.fields(LoraConfig) if section + f.name in settings}
  base = _open_base(opened.path, settings['base.path']).first_layers(settings.get('start_layers'))
  fields = {f.name: getattr(opened, f.name) for f in dataclasses.fields(Pretrained)}
  config = LoraConfig(**stored | {'targets': tuple(stored['targets'])})
  return _checked(Adapted(**fields, lora=config, base=base, base_digest=settings['base.digest']))


def open_peft(path: pathlib.Path) -> Adapted:
  """Open a folder of PEFT.

  Raises:
    UserError: its files cannot be used, or its base is not on this machine, or has another shape.
  """
  config = peft.read_config(path)
  base = _open_base(path, config.base)
  tensors = peft.Tensors(path, config, base.model, base.head)
  return _checked(
    Adapted(
      path,
      'peft',
      base.model,
      tensors.head,
      reward_token_id=base.reward_token_id if tensors.reward_token_id is None else tensors.reward_token_id,
      settings=base.settings,
      lora=tensors.lora,
      base=base,
      base_digest=tensors.base_digest,
      tensors=tensors,
    )
  )


def _open_base(path: pathlib.Path, named: str) -> Pretrained:
  """Open the base that a checkpoint names. A workdir that was moved as a whole has it next to the checkpoint.

  Raises:
    ConfigError: it does not exist.
  """
  given = paths.path_of(named)
  found = next((base for base in (given, path.parent / given.name) if base.exists()), None)
  if found is None:
    raise ConfigError(f'{path}: holds adapters, and there is no base at {named}: put it back there, or next to this folder')
  return open_pretrained(found)


def _checked(opened: Adapted) -> Adapted:
  """Return adapters that belong to models of the shape of their base.

  Raises:
    ConfigError: the base has another shape.
  """
  with_logits, base = opened.head == 'lm', opened.base
  have, want = output_settings(base.model, with_logits), output_settings(opened.model, with_logits)
  different = [f'model.{name} is {want[name]!r}, the base has {have[name]!r}' for name in have if have[name] != want[name]]
  if with_logits and base.head != 'lm':
    different.append(f'they are those of a language model, the base is a {base.head} model')
  if different:
    raise ConfigError(f'{opened.path}: its adapters do not fit the base {base.path}: {"; ".join(different[:4])}')
  return opened


class AdapterStart(NamedTuple):
  """What a run with adapters starts from.

  Attributes:
    frozen: the parameters under the adapters, in `LoraConfig.base_dtype`.
    trained: the scalar head of the base, float32, if it has that of the run; adapters are created by the run.
    settings: which identify the base in the run's checkpoints.
  """

  frozen: dict[str, Any]
  trained: dict[str, Any]
  settings: dict[str, str]


def adapter_start(
  start: Callable[[], Pretrained | None], model: ModelConfig, head: str, mesh: Mesh, config: LoraConfig, tokenizer: Tokenizer
) -> AdapterStart:
  """Return what a run with adapters starts from, also if it is resumed: its checkpoints have no base. Without adapters it is empty.

  Args:
    start: opens the base; None: there is none.
    model: the model to train.
    head: the head to train.
    mesh: devices to place the parameters on.
    config: of the adapters.
    tokenizer: of the run.

  Raises:
    ConfigError: the section cannot be used, there is no base on disk, or it has another shape.
    VocabularyError: the tokenizer has ids beyond the base's embedding.
  """
  check_adapters('lora', config)
  if config.rank is None:
    return AdapterStart({}, {}, {})
  opened = start()
  if opened is None or opened.kind == 'memory':
    what = (
      'no base: start from a checkpoint' if opened is None else 'a base in memory, but name it by its path: save it, and pass the folder'
    )
    raise ConfigError(f'lora.rank is {config.rank}, and there is {what}, or set lora.rank to None')
  params = start_params(opened, model, head, mesh, tokenizer, dtype=lora.loaded_dtype(config))
  trained = {'v_head': params['v_head'].astype(jnp.float32)} if 'v_head' in params else {}
  frozen = {name: value for name, value in params.items() if name != 'v_head'}
  settings = {'base.path': str(paths.absolute(opened.path)), 'base.digest': opened.digest(frozen)}
  _, placed = lora.split(lora.abstract_params(heads.abstract_model(model, head, config), mesh, config), config)
  held = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), lora.freeze(frozen, config), placed)
  return AdapterStart(held, trained, settings)
