"""One function to open any checkpoint: a run of polar_jax, a folder of Hugging Face or PEFT, or a GGUF or llama2.c file."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer, checksums, config_json, families, importer, peft, tokenizer_files
from polar_jax.checkpoints.formats import gguf, llama2c, storage
from polar_jax.checkpoints.run_folder import ASSETS
from polar_jax.config import ConfigError, ModelConfig, TemplateConfig
from polar_jax.data import vocabulary
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.special_tokens import read_json
from polar_jax.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from polar_jax.model import heads
from polar_jax.runtime import paths

# Fields that determine how a model is computed. They come from the config, not from the checkpoint.
_COMPUTE = ('compute_dtype', 'remat', 'scan_unroll', 'attention', 'init_std', 'v_head_init', 'frozen_layers')


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A checkpoint on disk, described before any weight is read.

  Attributes:
    path: the folder or file.
    kind: 'run', 'hugging_face', 'peft', 'gguf' or 'llama2c'.
    model: shape of the model.
    head: 'reward', 'lm' or 'value'.
    architecture: class name in a Hugging Face config.json; None for the other kinds.
    reward_token_id: from a Hugging Face config.json, if it has the key.
    settings: the stored settings of a run; empty for the other kinds.
    source: the stored tensors; None for a run.
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
    """Return the tensors of the model under their Hugging Face names."""
    return families.stored_tensors(self.model, self.head, self.architecture)

  def params(
    self, mesh: Mesh, dtype: str | None = None, *, head: str | None = None, on_tensor: importer.OnTensor | None = None
  ) -> dict[str, Any]:
    """Return the parameters, each read directly into its shards on `mesh`.

    Args:
      mesh: devices to place them on.
      dtype: dtype of all parameters; None: as stored.
      head: the head that is needed; if the checkpoint has another one, only the decoder is read.
      on_tensor: see `importer.load`; not called for a run.

    Raises:
      UserError: the files do not match the config; the message names file and tensor.
    """
    if self.source is not None:  # before the shapes of an absurd config reach JAX
      importer.check(self.source, self.stored(), compare_tied=False)
    abstract = sharding.abstract_params(heads.abstract_model(self.model, self.head), mesh, dtype)
    if head not in (None, self.head):
      abstract = {'decoder': abstract['decoder']}
    if self.source is not None:
      return importer.load(self.source, self.stored(), abstract, dtype, on_tensor)
    return checkpointer.load_params(self.path, abstract, as_stored=dtype is None)

  def digest(self, frozen: dict[str, Any]) -> str:
    """Return what identifies parameters that adapters are trained on: their dtype and checksums, on any mesh and in any file format.

    Args:
      frozen: read from this checkpoint, without a scalar head.
    """
    return f'{frozen["decoder"]["norm"].dtype}:{checksums.digest(checksums.of_arrays(frozen))}'

  @functools.cached_property
  def assets(self) -> pathlib.Path:
    """The folder of the tokenizer files. For GGUF and llama2.c files and for buckets it is a temporary copy."""
    if self.kind == 'hugging_face':
      return self.path
    if self.kind == 'run' and not paths.in_bucket(self.path):
      return self.path / ASSETS
    folder = pathlib.Path(tempfile.mkdtemp(prefix='polar_jax_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not earlier: a tokenizer reads its file on first use
    if self.kind == 'run':
      return _fetch(self.path / ASSETS, folder / ASSETS)
    if isinstance(self.source, gguf.GgufSource):
      tokenizer_files.from_gguf(self.source.metadata(), folder)
    else:
      tokenizer_files.from_llama2c(_llama2c_tokenizer(self.path, self.model.vocab_size), folder)
    return folder

  @property
  def has_tokenizer(self) -> bool:
    """Whether the checkpoint comes with a tokenizer."""
    return self.settings.get('tokenizer') == 'byte' or self.assets.is_dir()

  def tokenizer(self) -> Tokenizer:
    """Return the checkpoint's own tokenizer.

    Raises:
      UserError: the checkpoint has no tokenizer files, or they cannot be read.
      VocabularyError: the tokenizer has ids beyond the embedding.
    """
    if self.settings.get('tokenizer') == 'byte':
      tokenizer: Tokenizer = ByteTokenizer()
    elif self.assets.is_dir():
      tokenizer = open_tokenizer(self.assets)
    else:
      raise ConfigError(f'{self.path}: has no tokenizer files; set tokenizer.kind and tokenizer.path')
    own = 'its tokenizer' if self.kind in ('gguf', 'llama2c') else None  # which was converted to a temporary file
    vocabulary.check_tokenizer(tokenizer, self.model.known_vocab_size, str(self.path), own)
    return tokenizer

  def template(self, given: TemplateConfig) -> TemplateConfig:
    """Return the template the model was trained with, with every field that `given` sets to something other than its default.

    Raises:
      ConfigError: `given` contradicts the chat template of a reward model of another kind than POLAR.
    """
    default = TemplateConfig()
    trained = {f.name: self.settings.get(f'template.{f.name}', getattr(default, f.name)) for f in dataclasses.fields(default)}
    if self.reward_token_id is not None:
      trained['reward_token_id'] = self.reward_token_id
    chosen = {name: value for name in trained if (value := getattr(given, name)) != getattr(default, name)}
    config = TemplateConfig(**trained | chosen)
    if config.chat == 'auto' and self._is_conversational():
      own = [f'template.{name}' for name in ('separator', 'separator_id', 'reward_token', 'reward_token_id') if name in chosen]
      if own:
        raise ConfigError(
          f'{self.path}: has a chat template and no reward_token_id in its config.json, but {own[0]} is set; say which of both its texts '
          'have: template.chat=always (the chat template) or template.chat=never'
        )
      config = dataclasses.replace(config, chat='always')
    return dataclasses.replace(config, use_reference=False) if config.chat == 'always' else config

  def _is_conversational(self) -> bool:
    """Return whether this is a reward model of another kind than POLAR, which reads conversations through its chat template."""
    is_candidate = self.kind == 'hugging_face' and self.head == 'reward' and self.reward_token_id is None
    return is_candidate and ChatTemplate.exists(self.assets)

  def compute_like(self, config: ModelConfig) -> ModelConfig:
    """Return the checkpoint's model with the compute settings of `config`: precision, attention backend, rematerialization."""
    return with_compute_of(self.model, config)

  def first_layers(self, count: int | None) -> Pretrained:
    """Return the checkpoint with its first `count` layers alone, below the same last norm and head; None: all of it.

    Raises:
      ConfigError: it has fewer layers.
    """
    if count is None:
      return self
    if count > self.model.num_layers:
      raise ConfigError(f'{self.path}: has {self.model.num_layers} layers; start_layers is {count}, set it to at most that')
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Pretrained)}
    return _FirstLayers(**fields | {'model': dataclasses.replace(self.model, num_layers=count)}, whole=self)

  def head_params(self, mesh: Mesh, dtype: str | None, head: str) -> dict[str, Any]:
    """Return the parameters of a model with `head`, which may differ from the checkpoint's.

    A reward or value model created from a language model gets a head of zeros. Reward and value heads have the same parameters.

    Raises:
      UserError: `head` is 'lm', but the checkpoint has no vocabulary projection.
    """
    if head == self.head or (head != 'lm' and self.head != 'lm'):
      return self.params(mesh, dtype)
    if head == 'lm':
      raise ConfigError(f'{self.path}: is a {self.head} model, which has no vocabulary projection; it cannot be loaded as a language model')
    v_head = sharding.abstract_params(heads.abstract_model(self.model, head), mesh, dtype)['v_head']
    params = self.params(mesh, dtype, head=head)
    kind = jax.tree.leaves(params)[0].dtype if dtype is None else v_head.dtype
    return params | {'v_head': jax.device_put(jnp.zeros(v_head.shape, kind), v_head.sharding)}


@dataclasses.dataclass(frozen=True)
class _FirstLayers(Pretrained):
  """A checkpoint of which only the first layers are used. Everything else is that of `whole`."""

  whole: Pretrained = dataclasses.field(kw_only=True)

  def params(
    self, mesh: Mesh, dtype: str | None = None, *, head: str | None = None, on_tensor: importer.OnTensor | None = None
  ) -> dict[str, Any]:
    return first_layers_of(self.whole.params(mesh, dtype, head=head, on_tensor=on_tensor), self.model.num_layers)

  @functools.cached_property
  def assets(self) -> pathlib.Path:
    return self.whole.assets

  @property
  def has_tokenizer(self) -> bool:
    return self.whole.has_tokenizer

  def tokenizer(self) -> Tokenizer:
    return self.whole.tokenizer()

  def template(self, given: TemplateConfig) -> TemplateConfig:
    return self.whole.template(given)

  def digest(self, frozen: dict[str, Any]) -> str:
    return self.whole.digest(frozen)


def first_layers_of(params: dict[str, Any], count: int) -> dict[str, Any]:
  """Return the parameters of a model with the first `count` of its layers."""
  decoder = params['decoder']
  return {**params, 'decoder': {**decoder, 'layers': jax.tree.map(lambda a: a[:count], decoder['layers'])}}


def with_compute_of(model: ModelConfig, config: ModelConfig) -> ModelConfig:
  """Return `model` with the compute settings of `config`: precision, attention backend, rematerialization, initialization."""
  return dataclasses.replace(model, **{name: getattr(config, name) for name in _COMPUTE})


def has_no_shape(model: ModelConfig) -> bool:
  """Return whether a config sets only how to compute, and the vocabulary: its shape is then that of the checkpoint to start from."""
  return with_compute_of(dataclasses.replace(model, vocab_size=None), ModelConfig()) == ModelConfig()


def open_pretrained(path: str | pathlib.Path) -> Pretrained:
  """Open a checkpoint by reading its config and the headers of its files; no weights are read.

  Raises:
    UserError: nothing exists at `path`, or its kind or family is not supported; the message says what is.
  """
  path = paths.path_of(path)
  if path.is_file() and not paths.in_bucket(path):
    return _open_file(path)
  if not path.is_dir():
    raise ConfigError(f'checkpoint {path}: no such file or folder')
  if (path / checkpointer.FOLDER).is_dir():
    return _open_run(path)
  if paths.in_bucket(path):
    raise ConfigError(f'checkpoint {path}: not a run of polar_jax, and only runs are read from a bucket: copy it here, or mount the bucket')
  if (path / peft.CONFIG).is_file():
    from polar_jax.checkpoints import adapted

    return adapted.open_peft(path)
  if (path / 'config.json').is_file():
    file = path / 'config.json'
    c = config_json.from_json(read_json(file), str(file))
    return Pretrained(path, 'hugging_face', c.model, c.head, c.architecture, c.reward_token_id, source=storage.open_folder(path))
  content = ', '.join(sorted(p.name for p in path.iterdir())[:10]) or 'nothing'
  raise ConfigError(
    f'checkpoint {path}: neither a run of polar_jax (a folder with {checkpointer.FOLDER}/) nor a folder of Hugging Face (config.json) or '
    f'PEFT ({peft.CONFIG}); it contains: {content}'
  )


def _open_file(path: pathlib.Path) -> Pretrained:
  if path.suffix == '.gguf':
    source: gguf.GgufSource | llama2c.Llama2cSource = gguf.open_gguf(path)
  elif path.suffix == '.bin':
    source = llama2c.open_llama2c(path)
  else:
    raise ConfigError(f'checkpoint {path}: a file must be a .gguf or a llama2.c .bin; for a Hugging Face checkpoint name the folder')
  return Pretrained(path, 'gguf' if path.suffix == '.gguf' else 'llama2c', source.model, 'lm', source=source)


def _fetch(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copy the files of `source`, if there are any, to `folder` and return `folder`."""
  for file in source.iterdir() if source.is_dir() else ():
    paths.copy(file, folder / file.name)
  return folder


def _llama2c_tokenizer(model_file: pathlib.Path, vocab_size: int | None) -> pathlib.Path:
  names = (f'tok{vocab_size}.bin', 'tokenizer.bin')
  existing = [file for name in names if (file := model_file.with_name(name)).is_file()]
  if not existing:
    raise ConfigError(f'{model_file}: no tokenizer next to it; copy {" or ".join(names)} there')
  return existing[0]


def _open_run(path: pathlib.Path) -> Pretrained:
  settings = checkpointer.load_settings(path)
  fields = {f.name: settings[f'model.{f.name}'] for f in dataclasses.fields(ModelConfig) if f'model.{f.name}' in settings}
  objectives = [head.objective for head in heads.HEADS.values()]
  if settings.get('objective') not in objectives or type(fields.get('vocab_size')) is not int:
    raise ConfigError(
      f'{path}: the settings of its checkpoint do not describe a model (an objective of {", ".join(objectives)}, and model.vocab_size); '
      'restore the folder from a backup, or run the stage that writes it again'
    )
  opened = Pretrained(path, 'run', ModelConfig(**fields), heads.head_of(settings['objective']), settings=settings)
  if 'base.digest' not in settings:
    return opened
  from polar_jax.checkpoints import adapted

  return adapted.open_run(opened)


def start_params(
  source: pathlib.Path | Pretrained,
  model: ModelConfig,
  head: str,
  mesh: Mesh,
  tokenizer: Tokenizer | None = None,
  layers: int | None = None,
  dtype: str = 'float32',
) -> dict[str, Any]:
  """Return the parameters that a training run starts from: all of a checkpoint with the same head, else the decoder.

  Args:
    source: any checkpoint that `open_pretrained` reads, or one that is open already.
    model: the model to train.
    head: the head to train.
    mesh: devices to place the parameters on.
    tokenizer: of the run; None: not compared with the checkpoint's embedding.
    layers: the first ones of the checkpoint that are used; None: all.
    dtype: of the parameters.

  Raises:
    VocabularyError: the tokenizer has ids beyond the checkpoint's embedding.
    ConfigError: the checkpoint has another shape, or computes something else with the same shapes.
  """
  if not isinstance(source, Pretrained) and not source.exists():
    raise ConfigError(f'no checkpoint to start from in {source}: run the stage that writes it first, or name another checkpoint')
  opened = (source if isinstance(source, Pretrained) else open_pretrained(source)).first_layers(layers)
  if tokenizer is not None:
    vocabulary.check_tokenizer(tokenizer, opened.model.known_vocab_size, str(opened.path))
  with_logits = head == opened.head == 'lm'
  have, want = output_settings(opened.model, with_logits), output_settings(model, with_logits)
  different = [
    f'model.{name} is {want.get(name)!r}, the checkpoint has {have.get(name)!r}' for name in have if have[name] != want.get(name)
  ]
  if different:
    raise ConfigError(f'{opened.path} cannot be started from: {"; ".join(different[:4])}')
  return opened.params(mesh, dtype, head=head)


def output_settings(model: ModelConfig, with_logits: bool) -> dict[str, Any]:
  """Return the fields of `model` that its outputs depend on."""
  unused = {*_COMPUTE, 'family'} | (set() if with_logits else {'tie_embeddings'})
  unused |= config_json.unused_rope_fields(model)
  if model.rope_scaling != 'dynamic':
    unused.add('max_position')
  return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in unused}
