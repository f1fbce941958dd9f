"""The rewards: what an answer is worth.

Read `base` (what a reward is), `build` (which ones a run has), `scoring`; one file a component.
"""
