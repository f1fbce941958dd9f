"""Which file a tensor is read from, what is not read, and values that a narrower dtype cannot hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lsp_jax.checkpoint import export
from lsp_jax.checkpoint.run_dir import BASE
from lsp_jax.core.errors import InputError
from lsp_jax.model import weight_checks, weights
from lsp_jax.model.llama import forward
from lsp_jax.model.rope import RopeScaling
from lsp_jax.policy import load_pretrained, save_pretrained
from test_trainer import game_config
from test_weights import edit_config, edit_weights, refused
from tiny import VOCABULARY, hf_tiny, tiny_config, tiny_dir, tiny_params, write_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied."""
    return tiny_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def embedding_of(directory: Path) -> np.ndarray:
    return load_file(directory / "model.safetensors")[EMBEDDING]


def shard(directory: Path, *shards: list[str]) -> dict[str, Any]:
    """Splits `model.safetensors`: the tensors of each list, and all others; returns the index."""
    tensors = load_file(directory / "model.safetensors")
    named = {name for names in shards for name in names}
    groups = [*shards, [name for name in tensors if name not in named]]
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, file)
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(json.dumps(index))
    return index


# --- a head beside tie_word_embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sharded"), [("other", False), ("other", True), ("zero", False), ("one bit", True), ("last row", False)]
)
def test_a_head_of_its_own_is_kept(
    model: Path, tmp_path: Path, change: str, sharded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    head = embedding_of(model).copy()
    if change == "other":
        head = np.random.default_rng(5).normal(0, 0.3, head.shape).astype(np.float32)
    elif change == "one bit":
        head[3, 4] = np.nextafter(head[3, 4], np.float32(9))
    else:
        head[-1 if change == "last row" else slice(None)] = 0
    edit_weights(model, add={HEAD: head})
    if sharded:
        shard(model, [HEAD], [EMBEDDING])
    policy = load_pretrained(model)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and HEAD in said and EMBEDDING in said and "tie_word_embeddings" in said
    assert not policy.config.tie_word_embeddings
    np.testing.assert_array_equal(policy.params["lm_head"]["weight"], head)
    save_pretrained(policy, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(tmp_path / "export" / "model.safetensors")[HEAD], head)
    np.testing.assert_array_equal(embedding_of(tmp_path / "export"), policy.params["model"]["embed_tokens"]["weight"])
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "export").params, policy.params)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_an_equal_head_is_tied(
    model: Path, stored: str, sharded: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal in value, if the two are stored in two types; compared a few rows at a time."""
    monkeypatch.setattr(weight_checks, "_COMPARED", 1000)
    embedding = embedding_of(model).astype(jnp.dtype(stored))
    edit_weights(model, add={HEAD: embedding.astype(np.float32), EMBEDDING: embedding})
    if sharded:
        shard(model, [HEAD])
    policy = load_pretrained(model)
    assert policy.config.tie_word_embeddings and "lm_head" not in policy.params
    assert capsys.readouterr().err == ""


def test_a_head_rounded_to_another_type_is_another(model: Path) -> None:
    edit_weights(model, add={HEAD: embedding_of(model).astype(ml_dtypes.bfloat16)})
    policy = load_pretrained(model)
    assert not policy.config.tie_word_embeddings
    rounded = embedding_of(model).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(policy.params["lm_head"]["weight"], rounded)


def test_logits_with_a_head_of_its_own(tmp_path: Path) -> None:
    """A model of transformers whose flag was edited: the logits are those of before."""
    network = hf_tiny(tmp_path, vocab_size=VOCABULARY)
    write_tokenizer(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    policy = load_pretrained(tmp_path)
    import torch

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 7))
    with torch.no_grad():
        expected = network(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(forward(policy.params, policy.config, jnp.asarray(ids)), expected, atol=1e-4)


def test_a_head_of_another_shape(model: Path) -> None:
    edit_weights(model, add={HEAD: np.zeros((VOCABULARY, 16), np.float32)})
    refused(model, HEAD, "(296, 16)", "(296, 32)")


def test_a_head_is_not_dropped_on_the_configurations_word(model: Path) -> None:
    """A configuration from elsewhere, and a reward model, which has no place for a head."""
    edit_weights(model, add={HEAD: embedding_of(model) + 1})
    with pytest.raises(InputError, match=rf"{HEAD}.*differs from {EMBEDDING}"):
        weights.load_params(model, tiny_config())
    scorer = tiny_config(head="score")
    weights.save_params(tiny_params(scorer), scorer, model)
    edit_weights(model, add={HEAD: embedding_of(model)})
    assert "score" in weights.load_params(model, weights.read_config(model))
    edit_weights(model, add={HEAD: embedding_of(model) + 1})
    with pytest.raises(InputError, match=rf"{HEAD}.*would be lost"):
        weights.load_params(model, weights.read_config(model))


# --- other tensors that are not read -------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_stored_frequencies(
    tmp_path: Path, scaling: RopeScaling | None, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the configuration, or the plain ones as old files have them, are passed over; others are said."""
    config = tiny_config(num_hidden_layers=1, rope_scaling=scaling)
    tiny_dir(tmp_path, num_hidden_layers=1, rope_scaling=scaling)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = replace(config, rope_scaling=None).rope_frequencies()
    for value in (config.rope_frequencies(), plain):
        edit_weights(tmp_path, add={name: value.astype(jnp.dtype(stored))})
        weights.load_params(tmp_path, config)
        assert capsys.readouterr().err == ""
    for value in (plain * 1.05, np.ones(4), plain[:2]):
        edit_weights(tmp_path, add={name: value.astype(jnp.dtype(stored))})
        weights.load_params(tmp_path, config)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said and "rope_theta" in said


def test_an_adapter_beside_the_model(model: Path) -> None:
    """PEFT and transformers would apply it."""
    (model / "adapter_config.json").write_text("{}")
    refused(model, "adapter_config.json", "merge")


# --- the index decides -----------------------------------------------------------------------------------------------

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("stale_in", ["first", "last"])
def test_a_stale_copy_is_not_read(model: Path, source: Path, stale_in: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the order of the files, and also if its shape is another."""
    index = shard(model, [NORM], [UP])
    names = sorted(set(index["weight_map"].values()))
    tensor, file = (UP, names[0]) if stale_in == "first" else (NORM, names[-1])
    edit = load_file(model / file)
    save_file({**edit, tensor: np.zeros((3,), np.float32)}, model / file, metadata={"format": "pt"})
    params = load_pretrained(model).params
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(source).params)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and tensor in said and file in said and index["weight_map"][tensor] in said


def test_a_stale_head_does_not_untie(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index names the equal one."""
    edit_weights(model, add={HEAD: embedding_of(model)})
    index = shard(model, [HEAD])
    other = index["weight_map"][EMBEDDING]
    save_file({**load_file(model / other), HEAD: np.zeros((VOCABULARY, 32), np.float32)}, model / other)
    policy = load_pretrained(model)
    assert policy.config.tie_word_embeddings and "lm_head" not in policy.params
    assert HEAD in capsys.readouterr().err


def test_an_index_that_does_not_fit_its_shards(model: Path) -> None:
    index = shard(model, [NORM], [UP])
    good = dict(index["weight_map"])
    files = sorted(set(good.values()))

    def indexed(**changes: Any) -> None:
        weight_map = {name: file for name, file in {**good, **changes}.items() if file}
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    indexed(**{UP: files[0]})
    refused(model, UP, files[0], "not in this file", INDEX)
    indexed(**{NORM: None})
    (model / files[1]).rename(model / "kept")
    refused(model, UP, files[1], INDEX, "download it again")
    (model / "kept").rename(model / files[1])
    index_without = {name: file for name, file in good.items() if name != "model.layers.1.mlp.up_proj.weight"}
    (model / INDEX).write_text(json.dumps({"weight_map": index_without}))
    refused(model, "model.layers.1.mlp.up_proj.weight", files[-1], f"not in {INDEX}")
    indexed(extra=files[0])
    refused(model, "extra", files[0], "not in this file")


def test_shards_without_an_index(model: Path) -> None:
    shard(model, [NORM])
    (model / INDEX).unlink()
    refused(model, "model-00001-of-00002.safetensors", INDEX, "missing")


@pytest.mark.parametrize("with_index", [True, False])
def test_one_file_beside_shards(model: Path, with_index: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The one file, as in transformers, with a word."""
    shutil.copy(model / "model.safetensors", model / "kept")
    shard(model, [NORM])
    (model / "kept").rename(model / "model.safetensors")
    if not with_index:
        (model / INDEX).unlink()
    edit_weights(model, add={NORM: np.full(32, 7, np.float32)})
    np.testing.assert_array_equal(load_pretrained(model).params["model"]["norm"]["weight"], 7)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors is read" in said
    assert "model-00001-of-00002.safetensors and 1 more are not" in said


def test_a_file_that_the_index_does_not_list(model: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(model, [NORM])
    save_file({NORM: np.zeros(32, np.float32)}, model / "model-00003-of-00003.safetensors")
    params = load_pretrained(model).params
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(source).params)
    assert "model-00003-of-00003.safetensors is not" in capsys.readouterr().err


# --- range -----------------------------------------------------------------------------------------------------------

LARGEST = {"float16": 65519.996, "bfloat16": float(np.nextafter(np.float32(3.3961775e38), np.float32(0)))}


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("path", "sign"), [(UP, 1), (NORM, -1), (EMBEDDING, 1)])
def test_a_value_that_would_become_infinite(
    model: Path, tmp_path: Path, dtype: str, path: str, sign: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found in export and in loading by numpy's own cast, for the first value that does and the last that does not."""
    last = np.float32(LARGEST[dtype])
    beyond = np.nextafter(last, np.float32(np.inf))
    with np.errstate(over="ignore"):
        assert np.isfinite(last.astype(jnp.dtype(dtype))) and not np.isfinite(beyond.astype(jnp.dtype(dtype)))
    tensor = load_file(model / "model.safetensors")[path]
    tensor[(-1,) * tensor.ndim] = sign * last
    edit_weights(model, add={path: tensor})
    policy = load_pretrained(model)
    save_pretrained(policy, tmp_path / "export", dtype)
    written = load_file(tmp_path / "export" / "model.safetensors")[path]
    assert np.isfinite(written.astype(np.float32)).all()
    before = {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()}

    tensor[(-1,) * tensor.ndim] = sign * beyond
    tensor[(0,) * tensor.ndim] = np.nan  # hides nothing
    edit_weights(model, add={path: tensor})
    policy = load_pretrained(model)
    words = rf"{path} = {float(beyond)!r}".replace("+", r"\+") + f".*infinite in {dtype}"
    with pytest.raises(InputError, match=words):
        save_pretrained(policy, tmp_path / "export", dtype)
    with pytest.raises(InputError, match=words):
        weights.save_params(policy.params, policy.config, tmp_path / "direct", dtype)
    with pytest.raises(InputError, match=words):
        load_pretrained(model, dtype)
    assert {file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["export", "model"]


def test_the_layer_is_named(source: Path, tmp_path: Path) -> None:
    policy = load_pretrained(source)
    down = policy.params["model"]["layers"]["mlp"]["down_proj"]["weight"]
    policy.params["model"]["layers"]["mlp"]["down_proj"]["weight"] = down.at[1, 3, 4].set(7e4).at[1, 3, 5].set(-9e4)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj\.weight = 90000\.0"):
        save_pretrained(policy, tmp_path / "export", "float16")
    save_pretrained(policy, tmp_path / "export", "bfloat16")


def test_infinite_values_are_not_made_by_the_cast(model: Path) -> None:
    """What is infinite in the file is so in the parameters."""
    edit_weights(model, add={NORM: np.full(32, np.inf, np.float32)})
    assert np.isinf(load_pretrained(model, "float16").params["model"]["norm"]["weight"]).all()


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_a_runs_parameters(model: Path, tmp_path: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast for an evaluation in another type."""
    run = tmp_path / "run"
    shutil.copytree(model, run / BASE)
    (run / "config.json").write_text(game_config(model, run).to_json())
    params = load_pretrained(model).params
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].at[3].set(-7e4)
    monkeypatch.setattr(export, "_restored", lambda *_: params)
    if dtype == "float16":
        with pytest.raises(InputError, match=rf"{NORM} = 70000\.0.*infinite in float16"):
            export.load_run_params(run, 1, dtype)
    else:
        found = export.load_run_params(run, 1, dtype)["model"]["norm"]["weight"]
        assert np.isfinite(np.asarray(found, np.float32)).all() and found.dtype == (dtype or "float32")
