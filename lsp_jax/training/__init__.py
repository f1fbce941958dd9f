"""The training run.

Read `loop`, `step`, then `setup` and `checkpointing`. (The folder is not called `train`, as `lsp_jax.train` is the
function.)
"""
