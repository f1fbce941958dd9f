"""`python -m lsp_jax` is the command `lsp-jax`."""

import sys

from lsp_jax.cli import main

sys.exit(main())
