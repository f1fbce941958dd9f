"""Child processes for scoring: user functions, and model-written programs in a sandbox. Read `pool`, then `sandbox`."""
