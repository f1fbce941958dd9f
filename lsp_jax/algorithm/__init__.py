"""Algorithm 1 of the paper on device.

Read `spec` (what is fixed), `stages` (the stages in order), `rollout`, `learner_batch`.
"""
