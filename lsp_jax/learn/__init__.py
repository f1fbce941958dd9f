"""From log-probabilities to one optimiser step.

Read `spec`, `advantages`, `losses`, `logprobs`, `update`, `optimizer`.
"""
