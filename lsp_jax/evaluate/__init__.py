"""Evaluation: benchmarks with verifiable answers, and win rates against another model."""
