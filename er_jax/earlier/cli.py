"""The earlier name of `er_jax.tools.cli`."""

from er_jax.tools.cli import *  # noqa: F403
from er_jax.tools.cli import main

if __name__ == "__main__":
    main()
