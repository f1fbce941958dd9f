"""Evaluation: win rates against another model, and benchmarks with answers that can be checked."""
