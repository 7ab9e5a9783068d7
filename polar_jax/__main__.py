"""The command `python -m polar_jax` (see `polar_jax.main`)."""

from polar_jax.main import console

if __name__ == '__main__':  # processes that this one spawns import the module, too
  console()
