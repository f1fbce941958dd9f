"""The main job.

Read `loop`, `step`, then `setup` and `checkpointing`. (Not `train`: `lsp_jax.train` is the function.)
"""
