"""Both modes of the quality self-reward on the same 64 answers: how often `text` parses, and how the ranks agree.

    python benchmarks/judge_modes.py [--model DIRECTORY] [--output FILE.json]

16 instructions with four answers each: two that the model samples (temperature 0.7 and 1.5), one that belongs to
another instruction, and one that repeats its own beginning. Without `--model` the demo model is converted first.

A small model does not keep to the form of `text`. `forced` therefore writes the form for it and leaves only the seven
digits to the judge, greedily, each after the ones before: what `text` would say if the judge could hold its form.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lsp_jax as lsp
from lsp_jax.model import llama
from lsp_jax.model.gguf import demo_model
from lsp_jax.model.kv_cache import KVCache, empty_decode_cache
from lsp_jax.play.decode import Completions
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import DeviceReward
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.judge import Judge, judge_episode, judge_params
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.text_judge import judge_spec, judge_turns, parse_score, write_judgements
from lsp_jax.text.judge_prompts import CRITERIA, text_judge_template
from lsp_jax.training.setup import token_classes

INSTRUCTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about rain.",
    "What is 17 plus 25?",
    "List four animals that live in the sea.",
    "Translate into Spanish: good morning, my friend.",
    "Give me a short recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Write a polite e-mail that declines an invitation.",
    "What is the difference between a frog and a toad?",
    "Write a Python function that adds two numbers.",
    "Suggest a name for a bakery.",
    "How do I remove a coffee stain from a shirt?",
    "Why do leaves change colour in autumn?",
    "Describe the taste of a lemon to someone who never had one.",
)
KINDS = ("sampled at 0.7", "sampled at 1.5", "of another instruction", "repeats its beginning")
ANSWER_LENGTH = 48
JUDGE_LENGTH = 64


def answers_of(policy: lsp.Policy) -> list[list[str]]:
    """Four answers to each instruction, one of each kind."""
    cool, hot = (
        lsp.generate(
            policy,
            INSTRUCTIONS,
            SamplingConfig(temperature=temperature),
            seed=seed,
            max_completion_length=ANSWER_LENGTH,
        )
        for seed, temperature in ((0, 0.7), (1, 1.5))
    )
    shifted = [*cool[5:], *cool[:5]]
    repeated = [" ".join((text.split() or ["the"])[:3] * 8) for text in cool]
    return [list(group) for group in zip(cool, hot, shifted, repeated, strict=True)]


def make_episode(policy: lsp.Policy, answers: list[list[str]]) -> Episode:
    """The texts as an episode [16, 4], every answer ended by its stop token."""
    encode, stop = policy.tokenizer.encode, policy.tokenizer.stop_ids[0]

    def ragged(rows: list[list[int]]) -> tuple[jax.Array, jax.Array]:
        width = max(map(len, rows))
        tokens = jnp.asarray([row + [0] * (width - len(row)) for row in rows], jnp.int32)
        return tokens, jnp.asarray([len(row) for row in rows], jnp.int32)

    text = ragged([encode(instruction) for instruction in INSTRUCTIONS])
    tokens, lengths = ragged([[*encode(answer), stop] for group in answers for answer in group])
    shape = len(answers), len(answers[0])
    tokens, zeros = tokens.reshape(*shape, -1), jnp.zeros((*shape, tokens.shape[1]))
    done = Completions(tokens, lengths.reshape(shape), zeros, zeros, jnp.ones(shape, bool))
    return Episode(Queries(None, text, jnp.ones(shape[0], bool)), text, done)


@partial(jax.jit, static_argnames=("judge", "digits", "plus"))
def forced_items(params: Any, episode: Episode, *, judge: Judge, digits: tuple[int, int], plus: int) -> jax.Array:
    """The judge's probability of 1 against 0 for each criterion, float32 [N, G, 7], in `1+0+1+1+0+1+1`.

    The form is written for it; each digit is the more probable one, and what follows is conditioned on it.
    """
    reference, config = params["reference"], judge.config
    layers = llama.unstack_layers(reference["model"]["layers"], config.num_hidden_layers)

    def write(prefixes: Sequence[KVCache], last: jax.Array) -> jax.Array:
        shared = [
            [KVCache(prefix.keys[layer], prefix.values[layer], prefix.lengths) for prefix in prefixes]
            for layer in range(config.num_hidden_layers)
        ]
        cache = empty_decode_cache(config, last.shape[0], 2 * CRITERIA, last.dtype)

        def item(state: tuple[jax.Array, Any], number: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
            hidden, cache = state
            logits = llama.logits(reference, config, hidden)
            odds = logits[:, digits[1]] - logits[:, digits[0]]
            for offset, token in enumerate((jnp.where(odds > 0, digits[1], digits[0]), jnp.full_like(odds, plus, int))):
                column = 2 * number + offset
                hidden, cache = llama.decode_step(reference, layers, config, token, shared, cache, column)
            return (hidden, cache), jax.nn.sigmoid(odds)

        return jax.lax.scan(item, (last, cache), jnp.arange(CRITERIA))[1].T

    return judge_episode(params, episode, judge, write)


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Correlation of the ranks, equal values sharing their mean rank; None where one side does not vary."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def measure(policy: lsp.Policy) -> dict[str, Any]:
    """Scores of both modes and what they have in common."""
    classes, answers = token_classes(policy), answers_of(policy)
    episode = make_episode(policy, answers)
    reward = quality_reward(policy.params, policy, classes, RewardConfig())
    assert isinstance(reward, DeviceReward)
    logits = np.asarray(jax.jit(reward.score)(reward.params, episode).values)
    judge = Judge(policy.config, text_judge_template(policy.tokenizer), policy.tokenizer.encode(" ")[0], 16)
    params = judge_params(policy.params, judge, policy.tokenizer, classes)
    start = time.perf_counter()
    spec = judge_spec(judge, JUDGE_LENGTH, policy.tokenizer.stop_ids)
    written = write_judgements(params, episode, judge=judge, spec=spec)
    turns = judge_turns(written, policy.tokenizer)
    seconds = time.perf_counter() - start
    scores = [[None if turn is None else parse_score(turn) for turn in group] for group in turns]
    text = np.array([[np.nan if score is None else score for score in group] for group in scores])
    (zero,), (one,), (plus,) = (policy.tokenizer.encode(character) for character in "01+")
    items = np.asarray(forced_items(params, episode, judge=judge, digits=(zero, one), plus=plus))
    forced = (items > 0.5).sum(axis=-1)
    parsed = np.isfinite(text)
    return {
        "answers": int(parsed.size),
        "stopped": sum(turn is not None for group in turns for turn in group),
        "parsed": int(parsed.sum()),
        "spearman": spearman(logits[parsed], text[parsed]),
        "forced_scores": {int(score): int((forced == score).sum()) for score in np.unique(forced)},
        "forced_spearman": spearman(logits.ravel(), forced.ravel()),
        "forced_probabilities_spearman": spearman(logits.ravel(), items.sum(axis=-1).ravel()),
        "text_scores": sorted(text[parsed].astype(int).tolist()),
        "logits_mean": {kind: round(float(logits[:, i].mean()), 2) for i, kind in enumerate(KINDS)},
        "logits_range": [round(float(logits.min()), 2), round(float(logits.max()), 2)],
        "text_mean": {kind: _mean(text[:, i]) for i, kind in enumerate(KINDS)},
        "text_parsed": {kind: int(parsed[:, i].sum()) for i, kind in enumerate(KINDS)},
        "text_seconds_with_compilation": round(seconds, 1),
        "turns": turns,
    }


def _mean(values: np.ndarray) -> float | None:
    parsed = values[np.isfinite(values)]
    return round(float(parsed.mean()), 2) if len(parsed) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face directory; the demo model when not given")
    parser.add_argument("--output", help="JSON file for everything, the judge's turns included")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.model or demo_model(Path(temporary) / "demo")
        result = measure(lsp.load_pretrained(directory))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=2))


if __name__ == "__main__":
    main()
