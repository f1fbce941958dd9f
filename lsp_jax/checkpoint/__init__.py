"""What a run leaves on disk and takes up again: the run folder, checkpoints, exports.

Read `run_dir`, then `manager`.
"""
