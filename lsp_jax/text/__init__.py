"""Tokenizers, and the prompts of both roles and the judge. Read `tokenizer`, then `prompts`."""
