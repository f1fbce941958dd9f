"""What a model can do: win rates against another model, and benchmarks with answers that can be checked."""
