"""Child processes that score: user functions, and programs of the model in a sandbox. Read `pool`, then `sandbox`."""
