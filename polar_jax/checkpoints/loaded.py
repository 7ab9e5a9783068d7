"""A model in memory with the interface of a checkpoint on disk, so that a run can start from either."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints.pretrained import Pretrained
from polar_jax.config import TemplateConfig
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model.heads import abstract_model
from polar_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Loaded(Pretrained):
  """A `Pretrained` whose parameters are in memory.

  Attributes:
    arrays: the parameters, on devices.
    text: the model's tokenizer; None if it has none.
    reward_template: settings of its reward template.
  """

  arrays: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
  text: Tokenizer | None = None
  reward_template: TemplateConfig = dataclasses.field(default_factory=TemplateConfig)

  def params(self, mesh: Mesh, dtype: str | None = None, *, head: str | None = None, on_tensor: Any = None) -> dict[str, Any]:
    """Return the parameters, sharded over `mesh`.

    Args:
      mesh: devices.
      dtype: type of the parameters; None: as they are.
      head: if it differs from the model's, only the decoder is returned. None: the model's.
      on_tensor: unused; other kinds of checkpoints report each tensor that they read.
    """
    abstract = sharding.abstract_params(abstract_model(self.model, self.head), mesh, dtype)
    names = abstract if head in (None, self.head) else ('decoder',)
    place = lambda x, a: jax.device_put(x if dtype is None else x.astype(a.dtype), a.sharding)
    return {name: jax.tree.map(place, self.arrays[name], abstract[name]) for name in names}

  @functools.cached_property
  def assets(self) -> pathlib.Path:
    """The folder of the tokenizer files; it does not exist if the model has no tokenizer files."""
    path = getattr(self.text, 'path', None)
    return pathlib.Path('/nonexistent') if path is None else path.parent

  @property
  def has_tokenizer(self) -> bool:
    """Whether the model has a tokenizer."""
    return self.text is not None

  def tokenizer(self) -> Tokenizer:
    """Return the model's tokenizer.

    Raises:
      UserError: it has none.
    """
    if self.text is None:
      raise UserError('the model has no tokenizer; pass one to `load` or to the training function')
    return self.text

  def template(self, given: TemplateConfig) -> TemplateConfig:
    """Return the model's template, overridden by the fields of `given` that differ from their defaults."""
    default = TemplateConfig()
    chosen = {f.name: v for f in dataclasses.fields(default) if (v := getattr(given, f.name)) != getattr(default, f.name)}
    config = dataclasses.replace(self.reward_template, **chosen)
    return dataclasses.replace(config, use_reference=False) if config.chat == 'always' else config
