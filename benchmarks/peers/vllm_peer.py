"""vLLM's build for CPUs as a peer: its `LLM`, on token ids.

Each prompt is one request with `n` samples, so it is prefilled once for them (prefix caching on, and emptied before
every rollout: the repeats of a benchmark must not find their prompts computed already). `ignore_eos`, temperature 1, no
truncation. Engine and worker are processes of their own, as by default; the worker's threads are bound to the cores.
Eager: `PEER_VLLM_COMPILE=1` in the environment lets it compile by TorchInductor instead, which needs a C++ compiler.

Log-probabilities are its `prompt_logprobs`. There is no training step.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from protocol import Reply, serve, threads, versions

CACHE_GIB = 4
"""Memory set aside for keys and values: SmolLM2-135M's take 45 KiB a token in float32."""

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIB),
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",  # by default one core is left to the engine and the model gets the rest
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)
COMPILE = os.environ.get("PEER_VLLM_COMPILE") == "1"


class VllmPeer:
    """The engine in the precision last asked for."""

    def __init__(self, model_dir: str):
        self.model_dir, self.dtype = model_dir, ""
        self.engine: Any = None

    def load(self, dtype: str) -> Any:
        from vllm import LLM  # after the settings, in the main process only: its workers import this file

        if dtype != self.dtype:
            self.engine = None
            shape = json.loads(Path(self.model_dir, "config.json").read_text(encoding="utf-8"))
            self.engine = LLM(
                self.model_dir,
                dtype=dtype,
                skip_tokenizer_init=True,
                enforce_eager=not COMPILE,
                enable_prefix_caching=True,
                max_model_len=min(shape["max_position_embeddings"], 4096),
                max_num_seqs=256,
                max_num_batched_tokens=4096,
                disable_log_stats=True,
            )
            self.dtype = dtype
        return self.engine

    def versions(self) -> Reply:
        self.load(self.dtype or "float32")
        mode = "compiled" if COMPILE else "eager"
        return {
            "packages": versions("vllm-cpu", "torch", "transformers"),
            "dtype": self.dtype,
            "threads": threads(),
            "settings": f"{mode}, n samples a prompt, prefix cache emptied before each rollout",
        }

    def rollout(
        self, prompts: list[list[int]], repeats: int, new_tokens: int, seed: int, dtype: str = "float32"
    ) -> Reply:
        from vllm import SamplingParams

        engine = self.load(dtype)
        engine.reset_prefix_cache()
        sampling = SamplingParams(
            n=repeats,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            ignore_eos=True,
            min_tokens=0,
            max_tokens=new_tokens,
            detokenize=False,
            seed=None,  # a seed a request makes it sample row by row
        )
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        rows = [list(sample.token_ids) for output in outputs for sample in output.outputs]
        return {"seconds": seconds, "tokens": sum(map(len, rows)), "rows": rows}

    def logprobs(self, rows: list[list[int]], prompt_lengths: list[int], dtype: str = "float32") -> Reply:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        engine = self.load(dtype)
        outputs = engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        result = []
        for row, length, output in zip(rows, prompt_lengths, outputs, strict=True):
            found = output.prompt_logprobs[length:]
            result.append([at[token].logprob for token, at in zip(row[length:], found, strict=True)])
        return {"logprobs": result}


if __name__ == "__main__":
    serve(VllmPeer)
