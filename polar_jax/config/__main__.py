"""Prints docs/options.md: `python -m polar_jax.config > docs/options.md`."""

from polar_jax.config.reference import markdown

if __name__ == '__main__':
  print(markdown(), end='')
