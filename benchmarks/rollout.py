"""Decoding against the peers, all tokens forced, and what dropping finished rows saves.

    make bench-peers
    python benchmarks/rollout.py MODEL_DIR [--peers transformers vllm tunix] [--rounds 3]

1. The same weights: log-probabilities of the same rows from every engine, compared with ours.
2. Prompts of 64 tokens, 128 new ones, float32, temperature 1: useful tokens a second with prefill, engines in turn.
3. A spread of lengths (half of the rows end within the first quarter): the same with and without dropping.

Writes `results/rollout.json` and `results/rollout.md`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from limits import decode_products, rollout_roofline
from peers.client import Peer

import lsp_jax as lsp
from lsp_jax.learn.batch import Sampled, make_rows
from lsp_jax.learn.logprobs import completion_hidden, completion_tokens, token_statistics
from lsp_jax.play import chunked_decode, decode
from lsp_jax.play.chunked_decode import decode_in_chunks
from lsp_jax.play.decode import Completions, DecodeSpec
from lsp_jax.play.sampler import SamplingConfig, row_keys

PROMPT, NEW, CHUNK = 64, 128, 32
SIZES = {
    "B64, 8 x 8": (8, 8, ("transformers", "vllm")),
    "B64, distinct": (64, 1, ("transformers",)),
    "B16, distinct": (16, 1, ("transformers", "tunix", "vllm", "llamacpp")),
    "B1": (1, 1, ("transformers", "tunix", "vllm", "llamacpp")),
}
"""Prompts, rows of each, and the engines that are measured at that size."""


def prompts_of(number: int, vocabulary: int, length: int = PROMPT) -> np.ndarray:
    """Random ids, none of them a control token of the demo model (its first 17)."""
    return np.random.default_rng(number).integers(20, vocabulary, (number, length)).astype(np.int32)


class Ours:
    """This project's decoding on the loaded policy."""

    def __init__(self, policy: lsp.Policy):
        self.policy = policy

    def decode(self, prompts: np.ndarray, repeats: int, stops: tuple[int, ...] = (), chunk: int = CHUNK) -> Completions:
        ragged = jnp.asarray(prompts), jnp.full(len(prompts), prompts.shape[1], jnp.int32)
        keys = row_keys(jax.random.key(1), len(prompts) * repeats)
        spec = DecodeSpec(self.policy.config, SamplingConfig(), NEW, stops, chunk)
        return jax.block_until_ready(decode_in_chunks(self.policy.params, ragged, keys, spec))

    def rate(self, prompts: np.ndarray, repeats: int) -> float:
        """Tokens a second, prefill included."""
        start = time.perf_counter()
        self.decode(prompts, repeats)
        return len(prompts) * repeats * NEW / (time.perf_counter() - start)

    def logprobs(self, rows: np.ndarray, prompt: int) -> np.ndarray:
        """Of each row's tokens after the first `prompt`."""
        count, new = len(rows), rows.shape[1] - prompt
        zeros = jnp.zeros((count, new))
        batch = make_rows(
            (jnp.asarray(rows[:, :prompt]), jnp.full(count, prompt, jnp.int32)),
            Sampled(jnp.asarray(rows[:, prompt:]), jnp.full(count, new, jnp.int32), zeros, zeros),
            *(zeros[:, 0], zeros[:, 0] == 0, 1.0, "sequence"),
        )
        return np.asarray(self._logprobs(self.policy.params, batch))

    @partial(jax.jit, static_argnums=0)
    def _logprobs(self, params: Any, batch: Any) -> jax.Array:
        hidden = completion_hidden(params, self.policy.config, batch)
        return token_statistics(params, self.policy.config, hidden, completion_tokens(batch), 1.0, 512).logprobs


def peer_rate(peer: Peer, prompts: np.ndarray, repeats: int) -> float | str:
    request = {"op": "rollout", "prompts": prompts.tolist(), "repeats": repeats, "new_tokens": NEW}
    reply = peer.ask({**request, "seed": 1, "dtype": "float32"}, timeout=900)
    return reply["tokens"] / reply["seconds"] if "seconds" in reply else reply.get("unsupported", reply.get("error"))


def agreement(ours: Ours, peers: list[Peer]) -> dict[str, Any]:
    """Largest difference of each peer's log-probabilities from ours."""
    rows = prompts_of(4, ours.policy.config.vocab_size, PROMPT + 24)
    expected, found = ours.logprobs(rows, PROMPT), {}
    for peer in peers:
        request = {"op": "logprobs", "rows": rows.tolist(), "prompt_lengths": [PROMPT] * len(rows)}
        reply = peer.ask({**request, "dtype": "float32"}, timeout=900)
        found[peer.name] = reply.get("unsupported") or reply.get("error")
        if "logprobs" in reply:
            found[peer.name] = float(np.abs(np.asarray(reply["logprobs"]) - expected).max())
    return found


def of_size(ours: Ours, peers: list[Peer], name: str, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """All engines at one size, with the ratio to each peer and the share of what the machine could do.

    The limit takes its turn too: the products of a decode step by themselves, timed between the engines.
    """
    number, repeats, engines = SIZES[name]
    prompts = prompts_of(number, ours.policy.config.vocab_size)
    contestants = {"lsp_jax": partial(ours.rate, prompts, repeats)}
    contestants |= {peer.name: partial(peer_rate, peer, prompts, repeats) for peer in peers if peer.name in engines}
    products, config = decode_products(ours.policy.config, number * repeats), ours.policy.config

    def limit() -> float:
        decode_gemm = products()
        return rollout_roofline(
            config, number * repeats, number, PROMPT, NEW, **limits, decode_gemm=decode_gemm
        ).tokens_per_second

    results = measure.in_turn(contestants | {"limit": limit}, rounds, name)
    rates = {peer: measure.spread(values) for peer, values in results.items() if isinstance(values[0], float)}
    failed = {peer: values[0] for peer, values in results.items() if peer not in rates}
    best, roofline = rates["lsp_jax"]["median"], rates.pop("limit")
    ratios = {peer: best / value["median"] for peer, value in rates.items() if peer != "lsp_jax"}
    found = {"tokens_per_second": rates, "failed": failed, "ratio": ratios, "roofline": roofline}
    return found | {"share": best / roofline["median"]}


def dropping(ours: Ours, rounds: int) -> dict[str, Any]:
    """8 prompts x 8 rows, half of them ending in the first quarter: chunks with dropping against the single length."""
    prompts, stop = prompts_of(8, ours.policy.config.vocab_size), 2
    uniforms, draw = decode.row_uniforms, decode.sample

    def chosen(keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 10**6), (2,)))(keys)

    middle = float(np.median(np.asarray(chosen(row_keys(jax.random.key(1), 64)))[:, 0]))

    def ends(keys: jax.Array, position: jax.Array) -> jax.Array:
        """Whether a row ends here: half of them do, anywhere in the first quarter; a function of its key alone."""
        drawn = chosen(keys)
        return (drawn[:, 0] < middle) & (position >= drawn[:, 1] * NEW / 4 - 1)

    def marked(keys: jax.Array, position: jax.Array) -> jax.Array:
        return jnp.concatenate([uniforms(keys, position), ends(keys, position)[:, None]], axis=1)

    def ending(logits: jax.Array, uniform: jax.Array, sampling: SamplingConfig) -> Any:
        drawn = draw(logits, uniform[:, :2], sampling)
        other = jnp.where(drawn.token == stop, 20, drawn.token)  # nothing else ends a row
        return drawn._replace(token=jnp.where(uniform[:, 2] > 0, stop, other).astype(jnp.int32))

    def rate(keep: bool) -> float:
        counts = chunked_decode.row_counts
        chunked_decode.row_counts = (lambda batch: (batch,)) if keep else counts
        try:
            start = time.perf_counter()
            done = ours.decode(prompts, 8, (stop,))
            return float(np.asarray(done.lengths).sum()) / (time.perf_counter() - start)
        finally:
            chunked_decode.row_counts = counts

    decode.row_uniforms, decode.sample = marked, ending  # pyright: ignore[reportPrivateImportUsage]
    try:
        jax.clear_caches()
        results = measure.in_turn({"dropped": partial(rate, False), "kept": partial(rate, True)}, rounds, "spread")
        lengths = np.asarray(ours.decode(prompts, 8, (stop,)).lengths).tolist()
    finally:
        decode.row_uniforms, decode.sample = uniforms, draw
        jax.clear_caches()
    rates = {name: measure.spread(values) for name, values in results.items()}
    ratio = rates["dropped"]["median"] / rates["kept"]["median"]
    return {"useful_tokens_per_second": rates, "ratio": ratio, "lengths": lengths}


def table(found: dict[str, Any]) -> str:
    names = ["lsp_jax", *found["agreement"]]
    lines = [f"| tokens/s | {' | '.join(names)} | limit | share |", "|---" * (len(names) + 3) + "|"]
    for size, entry in found["sizes"].items():
        cells = []
        for name in names:
            rate = entry["tokens_per_second"].get(name)
            ratio = f", ratio {entry['ratio'][name]:.2f}" if name in entry["ratio"] else ""
            cells.append(measure.shown(rate) + ratio if rate else entry["failed"].get(name, ""))
        lines.append(
            f"| {size} | {' | '.join(cells)} | {measure.shown(entry['roofline'], 0)} | {100 * entry['share']:.0f} % |"
        )
    limits = ", ".join(f"{name} {value:.0f}" for name, value in found["limits"].items())
    drop = found["dropping"]
    rates = {name: measure.shown(value) for name, value in drop["useful_tokens_per_second"].items()}
    return "\n".join(
        [
            *lines,
            "",
            f"Limits measured in this run (GFLOP/s of the best product of any shape, GB/s): {limits}. The column "
            "`limit` is at the rate of a decode step's own products, measured between the engines.",
            f"Largest difference of log-probabilities from ours: {found['agreement']}.",
            f"Half of the rows ending in the first quarter, useful tokens/s: dropped {rates['dropped']}, kept "
            f"{rates['kept']}, ratio {drop['ratio']:.2f}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peers", nargs="*", default=["transformers", "tunix", "vllm", "llamacpp"])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="rollout", help="of the files in results/")
    options = parser.parse_args()
    ours = Ours(lsp.load_pretrained(options.model))
    found: dict[str, Any] = {"limits": measure.limits(), "sizes": {}}
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, options.model)) for name in options.peers]
        found["agreement"] = agreement(ours, peers)
        found["peers"] = {peer.name: peer.ask({"op": "versions"}) for peer in peers}
        for size in options.sizes:
            found["sizes"][size] = of_size(ours, peers, size, options.rounds, found["limits"])
    found["dropping"] = dropping(ours, options.rounds)
    measure.write(options.name, found, table(found))


if __name__ == "__main__":
    main()
