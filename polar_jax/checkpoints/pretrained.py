"""Any checkpoint that a user may have, behind one function: a run of ours, a Hugging Face folder, a GGUF or llama2.c file."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import config_json, families, importer, tokenizer_files
from polar_jax.checkpoints.formats import gguf, llama2c, storage
from polar_jax.config import ConfigError, ModelConfig, TemplateConfig
from polar_jax.data.special_tokens import read_json
from polar_jax.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.runtime import paths

ASSETS = 'assets'  # folder beside a run's checkpoints: tokenizer files and, of imported models, config.json and its like

# Heads by the objective that a run's checkpoint names.
HEADS = {'ranking': 'reward', 'next_token': 'lm', 'value': 'value'}
OBJECTIVES = {head: objective for objective, head in HEADS.items()}
_MODELS: dict[str, Callable[..., nnx.Module]] = {'reward': RewardModel, 'lm': LanguageModel, 'value': ValueModel}

# How a model is computed, not what it is: a checkpoint does not decide it.
_COMPUTE = ('compute_dtype', 'remat', 'scan_unroll', 'attention', 'init_std', 'v_head_init')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A checkpoint on disk: what it is, before any weight is read.

  Attributes:
    kind: 'run', 'hugging_face', 'gguf' or 'llama2c'.
    head: 'reward', 'lm' or 'value'.
    reward_token_id: of a Hugging Face config.json, if it says so.
    settings: the fingerprint of a run; empty for the others.
    source: stored tensors; None for a run.
  """

  path: pathlib.Path
  kind: str
  model: ModelConfig
  head: str
  architecture: str | None = None
  reward_token_id: int | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  source: storage.TensorSource | None = None

  def stored(self) -> list[families.Stored]:
    """The tensors of the model as Hugging Face names them."""
    return families.stored_tensors(self.model, self.head, self.architecture)

  def params(
    self, mesh: Mesh, dtype: str | None = None, *, head: str | None = None, on_tensor: importer.OnTensor | None = None
  ) -> dict[str, Any]:
    """Parameters on `mesh`, born sharded.

    Args:
      dtype: of all of them; None: as they are stored.
      head: if it is another one than the checkpoint's, the decoder alone is read.

    Raises:
      UserError: the files do not hold what the config describes, naming file and tensor.
    """
    abstract = sharding.abstract_params(abstract_model(self.model, self.head), mesh, dtype)
    if head not in (None, self.head):
      abstract = {'decoder': abstract['decoder']}
    if self.source is not None:
      return importer.load(self.source, self.stored(), abstract, dtype, on_tensor)
    return checkpoint.load_params(self.path, abstract, OBJECTIVES[self.head], as_stored=dtype is None)

  @functools.cached_property
  def assets(self) -> pathlib.Path:
    """The folder of the tokenizer files. Of GGUF and llama2.c files, and of a bucket, they are written to a temporary one."""
    if self.kind == 'hugging_face':
      return self.path
    if self.kind == 'run' and not paths.in_bucket(self.path):
      return self.path / ASSETS
    folder = pathlib.Path(tempfile.mkdtemp(prefix='polar_jax_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # a tokenizer reads its file when it is first used
    if self.kind == 'run':
      return _fetched(self.path / ASSETS, folder / ASSETS)
    if isinstance(self.source, gguf.GgufSource):
      tokenizer_files.from_gguf(self.source.metadata(), folder)
    else:
      tokenizer_files.from_llama2c(_llama2c_tokenizer(self.path, self.model.vocab_size), folder)
    return folder

  def tokenizer(self) -> Tokenizer:
    """
    Raises:
      UserError: there are no tokenizer files.
    """
    if self.settings.get('tokenizer') == 'byte':
      return ByteTokenizer()
    if not self.assets.is_dir():
      raise ConfigError(f'{self.path}: holds no tokenizer files; set tokenizer.kind and tokenizer.path')
    return open_tokenizer(self.assets)

  def template(self, given: TemplateConfig) -> TemplateConfig:
    """`given`, with what it leaves at its default taken from the checkpoint: a model must be read as it was trained."""
    default = TemplateConfig()
    known = {f.name: self.settings.get(f'template.{f.name}', getattr(default, f.name)) for f in dataclasses.fields(default)}
    known['use_reference'] &= self.settings.get('use_reference', True)  # of the arm that is trained without, whatever its config says
    if self.reward_token_id is not None:
      known['reward_token_id'] = self.reward_token_id
    chosen = {name: value for name in known if (value := getattr(given, name)) != getattr(default, name)}
    return TemplateConfig(**known | chosen)

  def compute_like(self, config: ModelConfig) -> ModelConfig:
    """The checkpoint's model, computed as `config` says: precision, attention, rematerialisation."""
    return dataclasses.replace(self.model, **{name: getattr(config, name) for name in _COMPUTE})


def abstract_model(model: ModelConfig, head: str) -> nnx.Module:
  """A model of shapes, without arrays."""
  return nnx.eval_shape(lambda: _MODELS[head](model, rngs=nnx.Rngs(params=0)))


def open_pretrained(path: str | pathlib.Path) -> Pretrained:
  """Opens a checkpoint: its config and the headers of its files are read, no weight is.

  Raises:
    UserError: there is no such thing, or it is of a kind or family that is not supported, saying what is.
  """
  path = paths.path_of(path)
  if path.is_file() and not paths.in_bucket(path):
    return _open_file(path)
  if not path.is_dir():
    raise ConfigError(f'checkpoint {path}: no such file or folder')
  if (path / checkpoint.FOLDER).is_dir():
    return _open_run(path)
  if paths.in_bucket(path):
    raise ConfigError(f'checkpoint {path}: no run of polar_jax, and only those are read from a bucket: copy it here, or mount the bucket')
  if (path / 'config.json').is_file():
    file = path / 'config.json'
    c = config_json.from_json(read_json(file), str(file))
    return Pretrained(path, 'hugging_face', c.model, c.head, c.architecture, c.reward_token_id, source=storage.open_folder(path))
  held = ', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'
  raise ConfigError(
    f'checkpoint {path}: neither a run of polar_jax (a folder with {checkpoint.FOLDER}/) nor a Hugging Face folder (config.json); '
    f'it holds: {held}'
  )


def _open_file(path: pathlib.Path) -> Pretrained:
  if path.suffix == '.gguf':
    source: gguf.GgufSource | llama2c.Llama2cSource = gguf.open_gguf(path)
  elif path.suffix == '.bin':
    source = llama2c.open_llama2c(path)
  else:
    raise ConfigError(f'checkpoint {path}: a file must be a .gguf or a llama2.c .bin; of a Hugging Face checkpoint give the folder')
  return Pretrained(path, 'gguf' if path.suffix == '.gguf' else 'llama2c', source.model, 'lm', source=source)


def _fetched(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """`folder` with the files of `source`; it is not made where there are none."""
  for file in source.iterdir() if source.is_dir() else ():
    paths.copy(file, folder / file.name)
  return folder


def _llama2c_tokenizer(model_file: pathlib.Path, vocab_size: int | None) -> pathlib.Path:
  names = (f'tok{vocab_size}.bin', 'tokenizer.bin')
  found = [file for name in names if (file := model_file.with_name(name)).is_file()]
  if not found:
    raise ConfigError(f'{model_file}: no tokenizer beside it; looked for {" and ".join(names)}')
  return found[0]


def _open_run(path: pathlib.Path) -> Pretrained:
  settings = checkpoint.load_settings(path)
  fields = {f.name: settings[f'model.{f.name}'] for f in dataclasses.fields(ModelConfig) if f'model.{f.name}' in settings}
  return Pretrained(path, 'run', ModelConfig(**fields), HEADS[settings['objective']], settings=settings)


def start_params(path: pathlib.Path, model: ModelConfig, head: str, mesh: Mesh) -> dict[str, Any]:
  """What a training run of `model` starts from, in float32: all parameters of a checkpoint with that head, of another the decoder.

  Raises:
    ConfigError: the checkpoint is of another shape, or computes something else with the same shapes.
  """
  if not path.exists():
    raise ConfigError(f'no checkpoint to start from in {path}: run the stage that writes it first, or name another')
  opened = open_pretrained(path)
  with_logits = head == opened.head == 'lm'
  have, want = _what_it_computes(opened.model, with_logits), _what_it_computes(model, with_logits)
  different = [
    f'model.{name} is {want.get(name)!r}, the checkpoint has {have.get(name)!r}' for name in have if have[name] != want.get(name)
  ]
  if different:
    raise ConfigError(f'{path} cannot be started from: {"; ".join(different[:4])}')
  return opened.params(mesh, 'float32', head=head)


def _what_it_computes(model: ModelConfig, with_logits: bool) -> dict[str, Any]:
  """The settings that decide a model's outputs."""
  unused = {*_COMPUTE, 'family'} | (set() if with_logits else {'tie_embeddings'})
  if model.rope_scaling != 'llama3':
    unused |= {'rope_low_freq_factor', 'rope_high_freq_factor', 'rope_original_length'}
  if model.rope_scaling != 'dynamic':
    unused.add('max_position')
  if model.rope_scaling == 'none':
    unused.add('rope_factor')
  return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in unused}
