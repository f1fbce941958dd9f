"""From log-probabilities to one optimiser step. Read `advantages`, `losses`, `logprobs`, then `update`."""
