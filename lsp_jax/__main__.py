"""Entry point of `python -m lsp_jax`, the same as the command `lsp-jax`."""

import sys

from lsp_jax.cli import main

sys.exit(main())
