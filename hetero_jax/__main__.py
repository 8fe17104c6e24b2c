"""`python -m hetero_jax`: the command line."""

import sys

from hetero_jax.cli import main

sys.exit(main())
