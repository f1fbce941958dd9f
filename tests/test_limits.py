"""The limits' arithmetic against a tiny model counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lsp_jax.model.config import LlamaConfig

# D 4, F 3, V 10, L 2, H 2, K 1, h 2. A layer: q 4 x 4, k and v 4 x 2 each, o 4 x 4, three of 4 x 3:
# 16 + 16 + 16 + 36 = 84. Head: 40 weights; layers and head 208, in bytes 832.
# A token: 2 x 2 x 84 = 336. A pair: 4 x 2 x 4 = 32. A token's cache: 2 x 2 x 2 x 4 = 32.
CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=3,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    tie_word_embeddings=True,
)
SLOW, ENDLESS = 1e-9, 1e30
"""One operation, or one byte, a second; so many that they take no time."""


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import limits

    return limits


def test_counts_of_one_token(limits: Any) -> None:
    assert limits.layer_weights(CONFIG) == 84
    assert limits.head_weights(CONFIG) == 40
    assert limits.token_operations(CONFIG) == 336
    assert limits.pair_operations(CONFIG) == 32
    assert limits.cache_bytes(CONFIG) == 32
    assert limits.weight_bytes(CONFIG) == 832


def test_rollout_by_operations(limits: Any) -> None:
    limit = limits.rollout_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS)
    # 6 prompt tokens, 2 x (1 + 2 + 3) pairs, 2 heads: 6 x 336 + 12 x 32 + 2 x 80
    assert limit.prefill_seconds == pytest.approx(2016 + 384 + 160)
    # two steps of 4 rows: 336 + 80, and 4 then 5 keys
    assert limit.decode_seconds == pytest.approx(4 * (416 + 4 * 32) + 4 * (416 + 5 * 32))
    assert limit.tokens_per_second == pytest.approx(12 / (2560 + 4480))


def test_decode_at_a_rate_of_its_own(limits: Any) -> None:
    same = limits.rollout_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS)
    half = limits.rollout_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS, SLOW / 2)
    assert half.prefill_seconds == same.prefill_seconds
    assert half.decode_seconds == pytest.approx(2 * same.decode_seconds)


def test_products_of_a_decode_step(limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = limits.decode_products(CONFIG, 3)
    monkeypatch.setattr(limits, "seconds", lambda call, at_least: call().shape[0] and 1e-9)
    assert taken() == pytest.approx(2 * 3 * 208)  # 208 weights, and a nanosecond for one step of three rows


def test_rollout_by_bytes(limits: Any) -> None:
    limit = limits.rollout_roofline(CONFIG, 4, 2, 3, 3, ENDLESS, SLOW)
    assert limit.prefill_seconds == pytest.approx(832 + 6 * 32)
    # the prompts' 6 tokens, and 4 then 8 generated ones
    assert limit.decode_seconds == pytest.approx(832 + 10 * 32 + 832 + 14 * 32)


def test_the_slower_of_both_counts_in_each_pass(limits: Any) -> None:
    # one row: a decode step is 416 + 4 x 32 = 544 operations and 832 + 4 x 32 = 960 bytes; its prefill of 3 tokens
    # is 3 x 336 + 6 x 32 + 80 = 1280 operations and 832 + 96 = 928 bytes
    limit = limits.rollout_roofline(CONFIG, 1, 1, 3, 2, SLOW, SLOW)
    assert limit.prefill_seconds == pytest.approx(1280)
    assert limit.decode_seconds == pytest.approx(960)


def test_step_by_operations(limits: Any) -> None:
    # 4 rows of 3 + 3 tokens, 5 of each in the layers: 20 x 336, 4 x 15 pairs x 32; 12 heads x 80
    layers, head = 6720 + 1920, 960
    plain = limits.step_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS)
    assert plain.generation == pytest.approx(2560 + 4480)
    assert plain.reference == pytest.approx(layers + head)
    assert plain.update == pytest.approx(3 * (layers + head))
    assert plain.total == pytest.approx(7040 + 4 * 9600)
    again = limits.step_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS, recompute=True, reference=False)
    assert again.reference == 0
    assert again.update == pytest.approx(4 * layers + 3 * head)


def test_a_shared_prompt_counts_once(limits: Any) -> None:
    # tokens: 2 prompts of 3, 4 rows of 2; pairs: 2 x 6, and 4 and 5 keys for each row; heads: 2 + 8
    layers, head = (6 + 8) * 336 + (12 + 4 * 9) * 32, 10 * 80
    shared = limits.step_roofline(CONFIG, 4, 2, 3, 3, SLOW, ENDLESS, shared_prompts=True)
    assert shared.reference == pytest.approx(layers + head)
    assert limits.step_roofline(CONFIG, 4, 4, 3, 3, SLOW, ENDLESS, shared_prompts=True).reference == pytest.approx(9600)


def test_step_by_bytes(limits: Any) -> None:
    tied = limits.step_roofline(CONFIG, 4, 2, 3, 3, ENDLESS, SLOW)
    assert tied.reference == pytest.approx(832)
    assert tied.update == pytest.approx(3 * 832 + 7 * 832)
    untied = limits.step_roofline(replace(CONFIG, tie_word_embeddings=False), 4, 2, 3, 3, ENDLESS, SLOW)
    assert untied.update == pytest.approx(3 * 832 + 7 * (832 + 160))  # an embedding of its own, 40 weights


def test_what_is_measured_is_a_rate(limits: Any) -> None:
    (gemm,) = limits.gemm_rates(((64, 64, 64),)).values()
    assert 0.01 < gemm < 1e6
    assert all(0.01 < rate < 1e5 for rate in limits.bandwidths(1 << 20).values())
