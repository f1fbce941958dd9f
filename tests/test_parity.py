"""Our Llama against transformers', and the model's ways of computing one thing against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from everyday import everyday
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig, RopeScaling
from lsp_jax.model.kv_cache import KVCache, empty_decode_cache
from lsp_jax.model.weights import load_params, read_config, save_params
from tiny import hf_tiny, tiny_config, tiny_params

TOLERANCE = 1e-4
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}

CASES: dict[str, dict[str, Any]] = {
    "4-4": MHA,
    "4-4-tied-eps": {**MHA, **TIED, "rms_norm_eps": 1e-3},
    "4-4-linear": {**MHA, "rope_parameters": LINEAR},
    "4-2-tied": {**GQA, **TIED},
    "4-2-llama3": {**GQA, "rope_parameters": LLAMA3},
    "4-2-theta": {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "4-2-wide-heads": {**GQA, "head_dim": 16, "rms_norm_eps": 1e-3},
    "4-2-attention-bias": {**GQA, "attention_bias": True},
    "4-2-mlp-bias-tied": {**GQA, **TIED, "mlp_bias": True},
    "9-3-tied": {**NINE, **TIED},
    "9-3-llama3": {**NINE, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-3},
    "9-3-narrow-heads-linear": {**NINE, "hidden_size": 36, "head_dim": 6, "rope_parameters": LINEAR},
    "9-3-all": {**NINE, **TIED, **BIASES, "hidden_size": 36, "head_dim": 8, "rope_parameters": LLAMA3},
    "one-kv-head-one-layer": {**GQA, "num_key_value_heads": 1, "num_hidden_layers": 1, **BIASES},
}

forward = jax.jit(llama.forward, static_argnums=1)
hidden_states = jax.jit(llama.hidden_states, static_argnums=1)
extend = jax.jit(llama.extend, static_argnums=1)


def random_tokens(vocabulary: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def hf_load(directory: Path) -> Any:
    return pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(directory, dtype="float32").eval()


def our_logits(directory: Path, tokens: np.ndarray, config: LlamaConfig | None = None) -> np.ndarray:
    config = config or read_config(directory)
    return np.asarray(forward(load_params(directory, config), config, jnp.asarray(tokens)))


def respell_rope(directory: Path, kind: str) -> None:
    """Rewrites `config.json` with older keys: `rope_theta`, `rope_scaling` and, older still, its `type`."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    name = rope.pop("rope_type")
    config["rope_scaling"] = None if name == "default" else {kind: name, **rope}
    (directory / "config.json").write_text(json.dumps(config))


# --- against transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", everyday(CASES, 0, 1, 5, 9))
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Logits of 2 x 160 tokens (llama3: 2.5 x the original length); both spellings; our export, read by both."""
    seed = list(CASES).index(name)
    model = hf_tiny(tmp_path / "hf", seed, **CASES[name])
    tokens = random_tokens(model.config.vocab_size, 2, 160, seed=seed)
    expected = hf_logits(model, tokens)
    assert np.abs(expected).max() > 0.5
    config = read_config(tmp_path / "hf")
    assert "rope_parameters" in json.loads((tmp_path / "hf/config.json").read_text())
    np.testing.assert_allclose(our_logits(tmp_path / "hf", tokens), expected, rtol=0, atol=TOLERANCE)

    params = load_params(tmp_path / "hf", config)
    save_params(params, config, tmp_path / "ours", max_shard_bytes=20_000 if seed % 2 else 5_000_000_000)
    assert (tmp_path / "ours/model.safetensors.index.json").exists() == bool(seed % 2)
    assert read_config(tmp_path / "ours") == config
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "ours", config), params)
    np.testing.assert_allclose(hf_logits(hf_load(tmp_path / "ours"), tokens), expected, rtol=0, atol=TOLERANCE)

    for kind in ("rope_type", "type"):
        respell_rope(tmp_path / "hf", kind)
        assert read_config(tmp_path / "hf") == config
        assert "rope_parameters" not in json.loads((tmp_path / "hf/config.json").read_text())
        (tmp_path / "hf/config.json").write_text(json.dumps(config.to_hf()))


@pytest.mark.parametrize("kind", ["rope_theta", "rope_type"])
def test_our_export_in_the_old_spelling_alone(kind: str, tmp_path: Path) -> None:
    """What an older transformers sees of our export (no `rope_parameters`) gives the same logits."""
    model = hf_tiny(tmp_path, 3, **GQA, rope_parameters=LLAMA3)
    tokens = random_tokens(101, 2, 160)
    config = read_config(tmp_path)
    save_params(load_params(tmp_path, config), config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["rope_parameters" if kind == "rope_theta" else "rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    np.testing.assert_allclose(hf_logits(hf_load(tmp_path), tokens), hf_logits(model, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_theta": 20000.0},
        {"rope_scaling": None},
        {"rope_scaling": RopeScaling("linear", 8.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 128)},
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ],
    ids=str,
)
def test_a_wrong_constant_is_seen(wrong: dict[str, Any], tmp_path: Path) -> None:
    """The tolerance is tight enough that each constant of the architecture matters."""
    model = hf_tiny(tmp_path, 4, **GQA, rope_parameters=LLAMA3, rms_norm_eps=1e-3)
    tokens = random_tokens(101, 2, 160)
    config = replace(read_config(tmp_path), **wrong)
    assert np.abs(our_logits(tmp_path, tokens, config) - hf_logits(model, tokens)).max() > 10 * TOLERANCE


def test_shards_written_by_transformers(tmp_path: Path) -> None:
    model = hf_tiny(tmp_path / "whole", 5, **NINE)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    tokens = random_tokens(101, 2, 20)
    expected = hf_logits(model, tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "shards", tokens), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """Half-precision weights are read exactly; computing in bfloat16 stays near; the export keeps the type."""
    torch = pytest.importorskip("torch")
    model = hf_tiny(tmp_path / "hf", 6, **GQA).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    expected_params = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    config = read_config(tmp_path / "hf")
    params = load_params(tmp_path / "hf", config)
    embedding = params["model"]["embed_tokens"]["weight"]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, expected_params["model.embed_tokens.weight"])
    q_proj = params["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_array_equal(q_proj[1].T, expected_params["model.layers.1.self_attn.q_proj.weight"])

    tokens = random_tokens(101, 2, 20)
    expected = hf_logits(hf_load(tmp_path / "hf"), tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "hf", tokens), expected, rtol=0, atol=TOLERANCE)
    half = load_params(tmp_path / "hf", config, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(dtype)}
    if dtype == "bfloat16":
        near = np.asarray(forward(half, config, jnp.asarray(tokens)))
        assert near.dtype == np.float32
        assert np.abs(near - expected).max() < 0.05 * np.abs(expected).max()
    save_params(half, config, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "ours", config, dtype), half)
    assert f'"dtype": "{dtype}"' in (tmp_path / "ours/config.json").read_text()


@pytest.mark.full
def test_demo_model(demo_dir: Path) -> None:
    """SmolLM2-135M-Instruct: logits within 2e-3 of transformers on texts of several kinds and lengths."""
    transformers = pytest.importorskip("transformers")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(demo_dir), hf_load(demo_dir)
    config = read_config(demo_dir)
    params = load_params(demo_dir, config)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    texts = (
        "The quick brown fox jumps over the lazy dog. " * 20,
        "def add(a, b):\n    return a + b  # 12345 + 67890 = 80235\n",
        "Größe, naïve, 東京, Ελλάδα, 🙂",
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    )
    for text in texts:
        tokens = np.asarray([tokenizer(text)["input_ids"]], np.int32)
        ours = np.asarray(forward(params, config, jnp.asarray(tokens)))
        np.testing.assert_allclose(ours, hf_logits(model, tokens), rtol=0, atol=2e-3)


# --- identities --------------------------------------------------------------------------------------------------

CONFIG = tiny_config(
    vocab_size=61,
    num_hidden_layers=3,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=False,
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 16),
)
EXACT = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG)


@jax.jit
def _log_probs(params: llama.Params, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    rows = jax.nn.log_softmax(llama.forward(params, CONFIG, tokens, mask)[:, :-1])
    return jnp.take_along_axis(rows, tokens[:, 1:, None], axis=-1)[..., 0]


def log_probs(params: llama.Params, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Log-probability of each next token given those before, [B, T - 1]."""
    return np.asarray(_log_probs(params, tokens, mask))


@pytest.mark.parametrize("before", everyday((0, 7), 1))
@pytest.mark.parametrize("after", everyday((0, 5), 1))
def test_padding_changes_no_log_prob(params: llama.Params, before: int, after: int) -> None:
    """Rows of lengths 3, 8 and 12, padded left, right and both, with pads of ids that also stand in the rows."""
    lengths, width = (3, 8, 12), before + 12 + after
    tokens = random_tokens(CONFIG.vocab_size, 3, width)
    mask = np.arange(width)[None] - before < np.array(lengths)[:, None]
    mask &= np.arange(width)[None] >= before
    padded = log_probs(params, tokens, mask)
    for row, length in enumerate(lengths):
        alone = log_probs(params, tokens[row : row + 1, before : before + length])[0]
        EXACT(padded[row, before : before + length - 1], alone)


def test_right_padding_needs_no_mask(params: llama.Params) -> None:
    tokens = random_tokens(CONFIG.vocab_size, 1, 12)
    EXACT(log_probs(params, tokens)[:, :7], log_probs(params, tokens[:, :8]))


def test_padding_without_its_mask_is_seen(params: llama.Params) -> None:
    """The comparison above can fail: left padding that no mask names changes log-probs."""
    tokens = random_tokens(CONFIG.vocab_size, 1, 12)
    assert np.abs(log_probs(params, tokens)[:, 4:] - log_probs(params, tokens[:, 4:])).max() > 1e-2


def concatenated(*parts: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Rows of ids from (tokens [N, S], lengths [N]) parts, each row of a part repeated for its share of the last's."""
    batch = len(parts[-1][0])
    rows = []
    for row in range(batch):
        owners = [(tokens, lengths, row * len(tokens) // batch) for tokens, lengths in parts]
        rows.append(np.concatenate([tokens[owner, : lengths[owner]] for tokens, lengths, owner in owners]))
    return rows


def whole_hidden(params: llama.Params, row: np.ndarray) -> np.ndarray:
    """Hidden states [T, D] of one row, right-padded to one length so that all rows share a program."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(hidden_states(params, CONFIG, padded))[0, : len(row)]


@pytest.mark.parametrize(
    "rows", everyday([(4,), (2, 2), (2, 6), (1, 2, 6)], 3), ids=lambda rows: "-".join(map(str, rows))
)
def test_extend_equals_forward(params: llama.Params, rows: tuple[int, ...]) -> None:
    """Ragged tokens after no, one or two shared prefixes, each row of a prefix serving one or several of the last."""
    random = np.random.default_rng(len(rows))
    parts = [
        (random_tokens(CONFIG.vocab_size, count, 9 - index, seed=index), random.integers(1, 9 - index, count))
        for index, count in enumerate(rows)
    ]
    caches: list[KVCache] = []
    hidden = jnp.zeros(0)
    for tokens, lengths in parts:
        hidden, cache = extend(params, CONFIG, jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), tuple(caches))
        caches.append(cache)
    lengths = parts[-1][1]
    last = np.asarray(llama.last_hidden(hidden, jnp.asarray(lengths)))
    found = np.asarray(hidden)
    for row, whole in enumerate(concatenated(*parts)):
        expected = whole_hidden(params, whole)
        EXACT(found[row, : lengths[row]], expected[len(whole) - lengths[row] :])
        EXACT(last[row], expected[-1])


@pytest.mark.parametrize("group", [1, 3])
def test_decode_equals_forward(params: llama.Params, group: int) -> None:
    """Greedy-free decoding of given tokens, one at a time, after ragged prompts shared by groups of answers."""
    prompts, lengths = random_tokens(CONFIG.vocab_size, 2, 7), np.array([3, 7])
    answers = random_tokens(CONFIG.vocab_size, 2 * group, 5, seed=1)
    _, cache = extend(params, CONFIG, jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32))
    layers = llama.unstack_layers(params["model"]["layers"], CONFIG.num_hidden_layers)
    shared = tuple((KVCache(k, v, cache.lengths),) for k, v in zip(cache.keys, cache.values, strict=True))
    step = jax.jit(llama.decode_step, static_argnums=2)
    own = empty_decode_cache(CONFIG, 2 * group, 6, jnp.dtype(jnp.float32))
    outputs = []
    for column in range(answers.shape[1]):
        hidden, own = step(params, layers, CONFIG, answers[:, column], shared, own, jnp.int32(column))
        outputs.append(np.asarray(hidden))
    for row, whole in enumerate(concatenated((prompts, lengths), (answers, np.full(2 * group, 5)))):
        EXACT(np.stack(outputs, 1)[row], whole_hidden(params, whole)[-5:])


@pytest.mark.full
def test_remat_gives_the_same_gradients_in_less_memory(params: llama.Params) -> None:
    tokens = random_tokens(CONFIG.vocab_size, 2, 64)
    weights = np.random.default_rng(1).normal(size=(2, 64, CONFIG.hidden_size)).astype(np.float32)

    def loss(params: llama.Params, remat: str) -> jax.Array:
        return jnp.sum(weights * llama.hidden_states(params, CONFIG, jnp.asarray(tokens), remat=remat))

    backbone = {"model": params["model"]}  # the head is not part of the hidden states
    programs = [jax.jit(jax.grad(partial(loss, remat=remat))).lower(backbone).compile() for remat in ("none", "full")]
    plain, remat = (program(backbone) for program in programs)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(one).max())
    kept, recomputed = (program.memory_analysis() for program in programs)
    assert kept is not None
    assert recomputed is not None
    assert recomputed.temp_size_in_bytes < 0.6 * kept.temp_size_in_bytes
