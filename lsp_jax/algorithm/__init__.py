"""Algorithm 1 of the paper on device.

Read `spec` (static settings), `stages` (the stages in order), `rollout`, `learner_batch`.
"""
