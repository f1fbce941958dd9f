"""transformers as a peer: `generate` of a batch, and log-probabilities of its forward pass. PyTorch, eager.

The prompts are repeated to rows, padded on the left; scaled-dot-product attention, dynamic cache, all processor cores.
`min_new_tokens` bars the stop token, so every row has its length (a row's distribution lacks that one token).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from protocol import Reply, serve, threads, versions
from transformers import AutoModelForCausalLM, GenerationConfig

torch.set_num_threads(threads())

ROWS_AT_ONCE = 8
"""Rows of a forward pass for log-probabilities, [rows, tokens, vocabulary] in float32."""


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> torch.Tensor:
    """Exactly `new_tokens` tokens after each prompt, [rows, new_tokens]: temperature 1, nothing truncated."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=model.config.pad_token_id or 0,
        eos_token_id=model.config.eos_token_id,
        bos_token_id=model.config.bos_token_id,
    )
    with torch.inference_mode():
        rows = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
    return rows[:, width:]


class TransformersPeer:
    """The model in the precision last asked for."""

    def __init__(self, model_dir: str):
        self.model_dir, self.dtype, self.model = model_dir, "", None

    def load(self, dtype: str) -> Any:
        if dtype != self.dtype:
            self.model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=dtype).eval()
            self.dtype = dtype
        return self.model

    def versions(self) -> Reply:
        model = self.load(self.dtype or "float32")
        return {
            "packages": versions("torch", "transformers"),
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "settings": f"eager, attention {model.config._attn_implementation}, prompts repeated to rows, "
            f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        }

    def rollout(
        self, prompts: list[list[int]], repeats: int, new_tokens: int, seed: int, dtype: str = "float32"
    ) -> Reply:
        model = self.load(dtype)
        repeated = [prompt for prompt in prompts for _ in range(repeats)]
        torch.manual_seed(seed)
        start = time.perf_counter()
        rows = generate(model, repeated, new_tokens).tolist()
        return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, rows)), "rows": rows}

    def logprobs(self, rows: list[list[int]], prompt_lengths: list[int], dtype: str = "float32") -> Reply:
        model = self.load(dtype)
        result = []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE]
            width = max(map(len, part))
            # padded on the right: causal attention keeps it from what is read
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in part])
            with torch.inference_mode():
                logprobs = model(input_ids=tokens).logits.float().log_softmax(-1)
            of_next = logprobs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            for i, row in enumerate(part):
                result.append(of_next[i, prompt_lengths[first + i] - 1 : len(row) - 1].tolist())
        return {"logprobs": result}


if __name__ == "__main__":
    serve(TransformersPeer)
