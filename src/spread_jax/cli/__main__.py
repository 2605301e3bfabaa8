"""`python -m spread_jax.cli`, the same as the command `spread-jax`."""

from spread_jax.cli import main

main()
