"""RoPE's keys in `config.json`, in both spellings and any combination: transformers' own frequencies, or refused."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.rope import ROPE_TYPES, rope_conflict
from lsp_jax.model.weights import read_config

CASES = 400
BASE = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LENGTH = "original_max_position_embeddings"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Any:
    """Transformers warns of every odd key."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def theirs(config: dict[str, Any]) -> np.ndarray | None:
    """The frequencies with which transformers rotates; None where it fails or they are not finite."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(copy.deepcopy(config)))
    except Exception:
        return None
    assert rotary.attention_scaling == 1.0 or rotary.rope_type not in ROPE_TYPES
    found = rotary.inv_freq.numpy()
    return found if np.isfinite(found).all() else None


def ours(config: dict[str, Any]) -> np.ndarray | InputError:
    try:
        return LlamaConfig.from_hf(copy.deepcopy(config)).rope_frequencies()
    except InputError as error:
        return error


def close(found: np.ndarray, expected: np.ndarray | None) -> bool:
    return expected is not None and found.shape == expected.shape and np.allclose(found, expected, rtol=3e-6, atol=0)


def maybe(draw: random.Random, into: dict[str, Any], key: str, *values: Any) -> None:
    if draw.random() < 0.5:
        into[key] = draw.choice(values)


def rope_object(draw: random.Random) -> dict[str, Any]:
    """One object of either spelling, valid by itself."""
    kind = draw.choice(ROPE_TYPES)
    rope: dict[str, Any] = {}
    if kind != "default" or draw.random() < 0.5:
        rope[draw.choice(["rope_type", "type"])] = kind
        maybe(draw, rope, "type", *ROPE_TYPES) if "rope_type" in rope else None
    if kind != "default":
        rope["factor"] = draw.choice([2.0, 3, 8.0])
    if kind == "llama3":
        rope |= {"low_freq_factor": draw.choice([1.0, 2]), "high_freq_factor": draw.choice([4.0, 5])}
        maybe(draw, rope, LENGTH, 16, 64, 8192)
    maybe(draw, rope, "rope_theta", 500.0, 20000, 5e5)
    maybe(draw, rope, "partial_rotary_factor", 1.0, 1)
    return rope


def rope_config(draw: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = dict(BASE)
    for key in ("rope_scaling", "rope_parameters"):
        maybe(draw, config, key, None, {}, *(rope_object(draw) for _ in range(4)))
    maybe(draw, config, "rope_theta", 300.0, 10000, 1e6)
    maybe(draw, config, LENGTH, 32, 128)
    maybe(draw, config, "max_position_embeddings", 48, 1024)
    maybe(draw, config, "head_dim", None, 8, 6)
    maybe(draw, config, "partial_rotary_factor", None, 1.0)
    return config


def test_valid_keys_in_any_combination() -> None:
    """Never refused, and the same numbers; the draws reach every type, and many that contradict themselves."""
    draw = random.Random(23)
    reached, conflicts = set(), 0
    for _ in range(CASES):
        config = rope_config(draw)
        expected, found = theirs(config), ours(config)
        assert expected is not None, config
        assert not isinstance(found, InputError), (config, found)
        assert close(found, expected), (config, found, expected)
        scaling = LlamaConfig.from_hf(config).rope_scaling
        reached.add(scaling.rope_type if scaling else "default")
        conflicts += bool(rope_conflict(config))
    assert reached == set(ROPE_TYPES)
    assert CASES // 10 < conflicts < CASES - CASES // 10


ODD = [None, True, False, "8.0", "llama3", 0, -1, -2.5, math.nan, math.inf, 10**400, [], [8.0], {}, {"factor": 2.0}]
UNSUPPORTED = ["yarn", "dynamic", "longrope", "proportional", "axial", "su", "mrope", "Llama3", "", 3]
KEYS = ["rope_theta", "factor", "low_freq_factor", "high_freq_factor", LENGTH, "partial_rotary_factor"]


def test_odd_values_in_any_place() -> None:
    """What is accepted has transformers' numbers; what transformers cannot use is refused."""
    draw = random.Random(24)
    refused = 0
    for _ in range(2 * CASES):
        config = rope_config(draw)
        places = [config, *(value for value in config.values() if isinstance(value, dict))]
        place = draw.choice(places)
        if draw.random() < 0.2:
            config[draw.choice(["rope_scaling", "rope_parameters"])] = draw.choice(ODD)
        elif place is not config and draw.random() < 0.4:
            place[draw.choice(["rope_type", "type"])] = draw.choice([*UNSUPPORTED, None])
        else:
            key = draw.choice(KEYS)  # a null factor is as good as none; transformers fails for it inside the object
            place[key] = draw.choice(ODD[key == "partial_rotary_factor" :])
        found = ours(config)
        refused += isinstance(found, InputError)
        assert isinstance(found, InputError) or close(found, theirs(config)), (config, found, theirs(config))
    assert CASES // 2 < refused < 2 * CASES - CASES // 4


@pytest.mark.parametrize("kind", [kind for kind in UNSUPPORTED if kind])
def test_an_unsupported_type_is_named_wherever_it_is_used(kind: Any) -> None:
    """Also behind a default `rope_parameters`; one that transformers does not look at is another matter."""
    rope = {"rope_type": kind, "factor": 4.0}
    for spelling in ({"rope_scaling": rope}, {"rope_parameters": rope}, {"rope_scaling": {**rope, "type": "linear"}}):
        error = ours({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **spelling})
        assert isinstance(error, InputError) and repr(kind) in str(error) and "rope_type" in error.field
    hidden = {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_parameters": rope}
    assert close(ours(hidden), theirs(hidden))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_scaling": {**LLAMA3, LENGTH: 64}, LENGTH: 32}, (f"{LENGTH} = 32", f"rope_scaling.{LENGTH} = 64")),
        ({"rope_scaling": {**LLAMA3, "rope_theta": 7.0}, "rope_theta": 9.0}, ("theta = 7.0", "rope_theta = 9.0")),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 9.0}, ("rope_parameters.rope_theta = 7.0", "= 9.0")),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, ("rope_scaling = {", "llama3", "not ")),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}},
            ("rope_scaling.rope_type = 'linear'", "rope_scaling.type = 'llama3'"),
        ),
    ],
)
def test_a_contradiction_is_said(
    keys: dict[str, Any], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**BASE, **keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_config(tmp_path)
    assert close(read.rope_frequencies(), theirs(config))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("lsp-jax: warning: ")
    assert all(word in said for word in words), said
    (tmp_path / "config.json").write_text(json.dumps(read.to_hf()))  # what we write ourselves is one thing
    assert read_config(tmp_path) == read and capsys.readouterr().err == ""


def test_one_rope_per_layer_type_is_refused() -> None:
    nested = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    for name in ("rope_scaling", "rope_parameters"):
        error = ours({**BASE, name: nested})
        assert isinstance(error, InputError) and error.field == f"{name}.full_attention"
