"""A run on disk: the run folder, checkpoints, exports.

Read `run_dir`, then `manager`.
"""
