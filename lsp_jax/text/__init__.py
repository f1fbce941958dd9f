"""Text to token ids and back; every prompt that a role or the judge is shown. Read `tokenizer`, then `prompts`."""
