"""Sampling: from prompts to completions. Read `decode`, `chunked_decode`, then `selfplay` for the two roles."""
