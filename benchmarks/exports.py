"""An export's greedy answers in other engines beside `lsp_jax.generate`: the same text, or how close the parting was.

    python benchmarks/exports.py EXPORT --vllm PYTHON --llamacpp PYTHON --llama-cpp-source DIR

EXPORT is a directory that `lsp-jax export` wrote. transformers runs under this Python; vLLM's build for CPUs under that
of `.venv-bench-vllm` (`make bench-peers`); llama.cpp under a Python with `xllamacpp` and what llama.cpp's converter
imports (gguf, torch, transformers), from a checkout of llama.cpp. An engine that is not given is left out. Where a
text differs, the gap is our log-probability of our first differing token less that of theirs, in nats.

Writes `results/exports.json` and `results/exports.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure

import lsp_jax as lsp
from lsp_jax.play.generate import prompt_ids

WORKER = Path(__file__).parent / "peers/texts.py"
NEW_TOKENS = 32
PROMPTS = (
    *("What is 7 + 5?", "What is 42 - 17?", "Calculate 8 times 9.", "How much is 130 plus 45?"),
    *("What is the capital of France?", "Who wrote Hamlet?", "Name three planets.", "What color is the sky?"),
    *("Write a haiku about rain.", "Tell me a short story about a fox.", "Explain gravity in one sentence."),
    *("Translate 'good morning' into Spanish.", "Give me a recipe for pancakes.", "Why do leaves change color?"),
    *("List the days of the week.", 'What does "ubiquitous" mean?', "Write a Python function that reverses a string."),
    *("Wie heißt die Hauptstadt von Österreich?", "こんにちは。元気ですか?", "Is 91 a prime number? 🙂"),
)


def answers(engine: str, python: str, model: Path) -> dict[str, Any]:
    asked = json.dumps({"prompts": PROMPTS, "new_tokens": NEW_TOKENS})
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, str(WORKER), engine, str(model)],
        input=asked,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **settings},
    )
    return json.loads(done.stdout)


def converted(python: str, source: Path, export: Path, folder: str) -> Path:
    """The export as GGUF in float32, by llama.cpp's own converter."""
    target = Path(folder) / "export.gguf"
    script = str(source / "convert_hf_to_gguf.py")
    subprocess.run([python, script, str(export), "--outtype", "f32", "--outfile", str(target)], check=True)
    return target


def gap(policy: lsp.Policy, prompt: str, ours: str, theirs: str) -> float | None:
    """Nats between the two tokens at which the texts part; None where one goes on as the other ends."""
    mine, other = policy.tokenizer.encode(ours), policy.tokenizer.encode(theirs)
    at = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
    if at is None:
        return None
    row = jnp.asarray([[*prompt_ids(policy, prompt, NEW_TOKENS), *mine[:at]]])
    logprobs = jax.nn.log_softmax(lsp.forward(policy.params, policy.config, row)[0, -1])
    return float(logprobs[mine[at]] - logprobs[other[at]])


def compared(policy: lsp.Policy, ours: list[str], reply: dict[str, Any]) -> dict[str, Any]:
    ids = [prompt_ids(policy, prompt, NEW_TOKENS) for prompt in PROMPTS]
    found = reply["prompt_tokens"]
    whole = isinstance(found[0], list)
    same_prompt = [a == b if whole else len(a) == b for a, b in zip(ids, found, strict=True)]
    parted = [
        {"prompt": prompt, "ours": mine, "theirs": other, "gap": gap(policy, prompt, mine, other)}
        for prompt, mine, other in zip(PROMPTS, ours, reply["texts"], strict=True)
        if mine != other
    ]
    return {
        "packages": reply["packages"],
        "same_text": len(PROMPTS) - len(parted),
        "same_prompt": sum(same_prompt),
        "prompts_compared_by": "ids" if whole else "their number",
        "parted": parted,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| engine | versions | the same text | the same prompt | largest gap where a text differs, nats |",
        "|---" * 5 + "|",
    ]
    for name, row in found.items():
        versions = ", ".join(f"{package} {number}" for package, number in row["packages"].items())
        gaps = [part["gap"] for part in row["parted"] if part["gap"] is not None]
        prompt = f"{row['same_prompt']} of {len(PROMPTS)} ({row['prompts_compared_by']})"
        widest = f"{max(gaps):.4f}" if gaps else ""
        lines.append(f"| {name} | {versions} | {row['same_text']} of {len(PROMPTS)} | {prompt} | {widest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llamacpp", metavar="PYTHON")
    parser.add_argument("--llama-cpp-source", type=Path, metavar="DIR")
    options = parser.parse_args()
    if bool(options.llamacpp) != bool(options.llama_cpp_source):
        parser.error("--llamacpp and --llama-cpp-source go together")
    policy = lsp.load_pretrained(options.export)
    ours = lsp.generate(policy, list(PROMPTS), lsp.SamplingConfig(temperature=0.0), max_completion_length=NEW_TOKENS)
    replies = {"transformers": answers("transformers", sys.executable, options.export)}
    if options.vllm:
        replies["vllm"] = answers("vllm", options.vllm, options.export)
    if options.llamacpp:
        with tempfile.TemporaryDirectory() as folder:
            model = converted(options.llamacpp, options.llama_cpp_source, options.export, folder)
            replies["llama.cpp"] = answers("llamacpp", options.llamacpp, model)
    found = {name: compared(policy, ours, reply) for name, reply in replies.items()}
    measure.write("exports", {"new_tokens": NEW_TOKENS, "ours": ours, "engines": found}, table(found))


if __name__ == "__main__":
    main()
