"""Loading and exporting: what is refused and with which words, shards, atomicity, the hub."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lsp_jax import policy
from lsp_jax.core import runtime
from lsp_jax.core.errors import InputError
from lsp_jax.model import weights
from lsp_jax.model.hf_names import leaf_shapes
from lsp_jax.model.llama import params_shape
from lsp_jax.policy import Policy, load_pretrained, save_pretrained
from tiny import VOCABULARY, byte_tokenizer, tiny_config, tiny_dir, tiny_params


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def loaded(source: Path) -> Policy:
    return load_pretrained(source)


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit_weights(directory: Path, drop: str | None = None, add: dict[str, Any] | None = None) -> None:
    tensors = load_file(directory / "model.safetensors")
    if drop:
        del tensors[drop]
    save_file(tensors | (add or {}), directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def refused(directory: Path | str, *words: str) -> None:
    """Loading fails with one line that holds all `words`."""
    with pytest.raises(InputError) as caught:
        load_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- reading -----------------------------------------------------------------------------------------------------


def test_tiny_dir_is_whole_and_repeatable(source: Path, loaded: Policy, tmp_path: Path) -> None:
    again = tiny_dir(tmp_path, tie_word_embeddings=False)
    for path in source.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size == VOCABULARY == byte_tokenizer().get_vocab_size()
    assert loaded.tokenizer.stop_ids == (2,)
    assert loaded.source == str(source)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_params(loaded.config))


def test_structure_is_that_of_init(loaded: Policy) -> None:
    """Loaded and random parameters are interchangeable: same tree and shapes."""
    for config in (loaded.config, tiny_config(attention_bias=True, mlp_bias=True)):
        shapes = params_shape(config)
        assert leaf_shapes(config).keys() == {
            "/".join(str(key.key) for key in path) for path, _ in jax.tree.flatten_with_path(shapes)[0]
        }
    assert jax.tree.map(jnp.shape, loaded.params) == jax.tree.map(jnp.shape, params_shape(loaded.config))


def test_every_tensor_arrives_in_its_place(loaded: Policy, source: Path) -> None:
    stored = load_file(source / "model.safetensors")
    assert len(stored) == 2 * 9 + 3
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            ours = loaded.params["model"]["layers"]["self_attn"][name]["weight"][layer]
            np.testing.assert_array_equal(ours.T, stored[f"model.layers.{layer}.self_attn.{name}.weight"])
    np.testing.assert_array_equal(loaded.params["lm_head"]["weight"], stored["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(model: Path, dtype: str) -> None:
    """Any of the three stored types, here mixed in one file, is cast to the one asked for."""
    stored = load_file(model / "model.safetensors")
    half = {name: ml_dtypes.bfloat16 if "self_attn" in name else np.float16 for name in stored if "layers" in name}
    mixed = {name: tensor.astype(half.get(name, np.float32)) for name, tensor in stored.items()}
    save_file(mixed, model / "model.safetensors")
    params = load_pretrained(model, dtype).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    down = params["model"]["layers"]["mlp"]["down_proj"]["weight"]
    expected = mixed["model.layers.1.mlp.down_proj.weight"].astype(jnp.dtype(dtype)).T
    np.testing.assert_array_equal(np.asarray(down[1]), expected)


@pytest.mark.full
def test_loading_holds_little_more_than_the_parameters(tmp_path: Path) -> None:
    """The arrays that loading fills become the parameters (on the CPU); a donating step frees them and is right."""
    config = tiny_config(num_hidden_layers=6, hidden_size=256, intermediate_size=512, head_dim=64)
    weights.save_params(tiny_params(config), config, tmp_path)
    total = sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params_shape(config)))
    weights.load_params(tmp_path, config)
    tracemalloc.start()
    try:
        params = weights.load_params(tmp_path, config)
        current, peak = tracemalloc.get_traced_memory()
        assert peak < total + 2.5 * 4 * 512 * 256  # the tensor read and the one before it
        doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)(params)
        jax.block_until_ready(doubled)
        gc.collect()  # where JAX lets go of host arrays at the latest
        assert tracemalloc.get_traced_memory()[0] < 0.2 * current
    finally:
        tracemalloc.stop()
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, 2 * other), doubled, tiny_params(config))


def test_tied_head_and_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    directory = tiny_dir(tmp_path)
    edit_weights(
        directory,
        add={
            "lm_head.weight": load_file(directory / "model.safetensors")["model.embed_tokens.weight"],
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        },
    )
    params = load_pretrained(directory).params
    assert "lm_head" not in params
    jax.tree.map(np.testing.assert_array_equal, params, tiny_params(tiny_config()))


# --- refused -----------------------------------------------------------------------------------------------------


def test_missing_head(model: Path) -> None:
    edit_weights(model, drop="lm_head.weight")
    refused(model, "lm_head.weight", f"({VOCABULARY}, 32)", "tie_word_embeddings")


def test_missing_tensor(model: Path) -> None:
    edit_weights(model, drop="model.layers.1.mlp.up_proj.weight")
    refused(model, "model.layers.1.mlp.up_proj.weight", "(48, 32)", "missing")


def test_unknown_tensor(model: Path) -> None:
    edit_weights(model, add={"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)})
    refused(model, "model.layers.0.self_attn.q_norm.weight", "(8,)")


def test_layer_beyond_the_config(model: Path) -> None:
    edit_config(model, num_hidden_layers=1)
    refused(model, "model.layers.1.")


def test_bias_that_the_config_denies(model: Path) -> None:
    edit_weights(model, add={"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)})
    refused(model, "model.layers.0.self_attn.q_proj.bias", "(32,)")


def test_wrong_shape(model: Path) -> None:
    edit_weights(model, add={"model.layers.1.mlp.up_proj.weight": np.zeros((32, 48), np.float32)})
    refused(model, "model.layers.1.mlp.up_proj.weight", "(32, 48)", "(48, 32)")


def test_quantised_tensor(model: Path) -> None:
    edit_weights(model, add={"model.norm.weight": np.zeros(32, np.int8)})
    refused(model, "model.norm.weight", "I8", "BF16")


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -1000])
def test_truncated_file(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(model, "model.safetensors", "damaged or truncated")


def test_garbage_file(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 5000)
    refused(model, "model.safetensors", "damaged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("not valid JSON",)),
        ("{", ("not valid JSON",)),
        ("[]", ("JSON object",)),
        ("{}", ("model_type",)),
        ('{"model_type": "qwen2"}', ("model_type", "qwen2", "llama")),
        ('{"model_type": "llama"}', ("vocab_size",)),
    ],
)
def test_bad_config(model: Path, content: str, words: tuple[str, ...]) -> None:
    (model / "config.json").write_text(content)
    refused(model, *words)


def test_config_of_wrong_types(model: Path) -> None:
    edit_config(model, num_key_value_heads="two")
    refused(model, "num_key_value_heads = 'two'", "positive integer")
    edit_config(model, num_key_value_heads=2, rope_parameters="none")
    refused(model, "rope_parameters = 'none'", "object or null in config.json")
    edit_config(model, rope_parameters=None, architectures=3)
    refused(model, "config.json", "not a usable Llama configuration")


BAD_FIELDS: dict[str, list[Any]] = {
    "hidden_size": [2**31, 10**400, True, 32.0],
    "num_key_value_heads": [-2, 0, "2", 2.0],
    "head_dim": [-8, 0, 7, 8.0],
    "max_position_embeddings": ["1024", 0, 1e6],
    "rms_norm_eps": ["small", -1, float("nan")],
    "tie_word_embeddings": ["false"],
    "bos_token_id": [{}, "<s>"],
    "eos_token_id": [[[1]], {"a": 1}],
    "rope_theta": [-1, float("nan"), 10**400],
    "rope_scaling": [{"rope_type": "linear", "factor": 0}, {"rope_type": ["linear"]}, "linear"],
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_fields_of_another_type_or_out_of_range(model: Path, field: str) -> None:
    """Refused where they are read, not by the first array that is made with them."""
    for value in BAD_FIELDS[field]:
        edit_config(model, rope_parameters=None, **{field: value})
        with pytest.raises(InputError):
            weights.read_config(model)


def test_a_billion_layers(model: Path) -> None:
    """No list of their names is made."""
    edit_config(model, num_hidden_layers=2**30)
    refused(model, "model.layers.2.input_layernorm.weight", "missing from the weights")


def test_missing_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "config.json", str(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickled_weights_are_never_opened(model: Path, name: str) -> None:
    """A pickle that would leave a mark when opened is refused with the way to convert it, and leaves none."""
    mark = model / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Trap()))
    (model / name).chmod(0)
    refused(model, name, "save_pretrained", "never opened")
    assert not mark.exists()


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, str(model), "model.safetensors")


def test_vocabulary_of_another_model(model: Path) -> None:
    config = tiny_config(vocab_size=VOCABULARY - 1)
    weights.save_params(tiny_params(config), config, model)
    refused(model, "tokenizer.vocab_size", str(VOCABULARY), str(VOCABULARY - 1))


def test_missing_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    refused(model, "tokenizer")


@pytest.mark.parametrize("dtype", ["float64", "int8", "f32", ""])
def test_unknown_dtype(source: Path, loaded: Policy, tmp_path: Path, dtype: str) -> None:
    for call in (lambda: load_pretrained(source, dtype), lambda: save_pretrained(loaded, tmp_path / "out", dtype)):
        with pytest.raises(InputError, match="bfloat16"):
            call()
    assert not (tmp_path / "out").exists()


# --- shards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(loaded: Policy, model: Path) -> Path:
    (model / "model.safetensors").unlink()
    weights.save_params(loaded.params, loaded.config, model, max_shard_bytes=20_000)
    return model


def test_shards_round_trip(sharded: Path, source: Path, loaded: Policy) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    assert set(index["weight_map"].values()) == set(files)
    whole = load_file(source / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        shard = load_file(sharded / file)
        np.testing.assert_array_equal(shard[name], whole[name])
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 20_000
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(sharded).params, loaded.params)


def test_missing_shard(sharded: Path) -> None:
    (sharded / sorted(sharded.glob("model-00002*"))[0]).unlink()
    refused(sharded, "model-00002-of", "download it again")


def test_truncated_shard(sharded: Path) -> None:
    shard = next(sharded.glob("model-00003*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(sharded, shard.name, "damaged")


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_bad_index(sharded: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    refused(sharded, "model.safetensors.index.json")


def test_reads_are_counted(loaded: Policy, tmp_path: Path) -> None:
    before = runtime.reads()
    weights.save_params(loaded.params, loaded.config, tmp_path)
    assert runtime.reads() - before == 2 * 9 + 3


# --- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export(loaded: Policy, source: Path, tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "deep" / "export"
    save_pretrained(loaded, out, dtype)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in source.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    again = load_pretrained(out, dtype or "float32")
    assert again.config == loaded.config
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or "float32"), loaded.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, expected)


def test_export_replaces_an_export_and_an_empty_directory(loaded: Policy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_pretrained(loaded, out)
    (out / "model-00001-of-00002.safetensors").write_bytes(b"left over from a sharded export")
    save_pretrained(loaded, out)
    assert not list(out.glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_over_its_own_source(model: Path) -> None:
    one = load_pretrained(model)
    save_pretrained(one, model, "bfloat16")
    save_pretrained(one, model)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(model).params, one.params)


@pytest.mark.parametrize("foreign", ["README.md", "metrics.jsonl", "src/code.py"])
@pytest.mark.parametrize("beside_an_export", [False, True])
def test_export_overwrites_nothing_else(loaded: Policy, model: Path, foreign: str, beside_an_export: bool) -> None:
    target = model if beside_an_export else model.parent / "other"
    (target / foreign).parent.mkdir(parents=True, exist_ok=True)
    (target / foreign).write_text("precious")
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=Path(foreign).parts[0]):
        save_pretrained(loaded, target)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before


def test_export_onto_a_file(loaded: Policy, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="is a file"):
        save_pretrained(loaded, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("step", ["save_params", "_sync", "rename"])
def test_failed_export_leaves_the_earlier_one(
    loaded: Policy, model: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A failure while writing, while syncing, or at the second rename: the earlier export is whole, nothing is left."""
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    rename = Path.rename

    def fail(*args: Any) -> Any:
        if step == "save_params":
            args[2].mkdir()
            (args[2] / "model.safetensors").write_bytes(b"half")
        if step != "rename" or ".new-" in args[0].name:
            raise OSError("disk full")
        return rename(*args)

    monkeypatch.setattr(Path, "rename", fail) if step == "rename" else monkeypatch.setattr(policy, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(loaded, model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == [model.name]


# --- where a model is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none-here", "a/b/c", "runs/", "two words"])
def test_paths_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(policy, "snapshot_download", None)  # a call would fail otherwise than expected
    refused(name, "no such directory")


def test_a_file_is_not_a_model(source: Path) -> None:
    refused(source / "model.safetensors", "give the directory")


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_hub_id_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(name, name, "local directory", "HF_HUB_OFFLINE", "HF_TOKEN")


def test_a_local_directory_comes_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr(policy, "snapshot_download", None)
    assert load_pretrained(source.name).source == source.name
    with pytest.raises(InputError, match="revision"):
        load_pretrained(source.name, revision="main")


def test_the_commit_of_a_download_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache names a snapshot's directory by its commit; a directory of one's own has none."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = shutil.copytree(source, tmp_path / "snapshots" / commit)
    monkeypatch.setattr(policy, "snapshot_download", lambda *_, **__: str(cached))
    assert load_pretrained("owner/name", revision="main").commit == commit
    assert load_pretrained(cached).commit == "" == load_pretrained(source).commit


def test_hub_download(source: Path, loaded: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a model needs is asked for; the revision goes along."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(source)

    monkeypatch.setattr(policy, "snapshot_download", download)
    assert load_pretrained("owner/name", revision="v1").source == "owner/name"
    name, options = calls[0]
    assert (name, options["revision"]) == ("owner/name", "v1")
    wanted = [*(path.name for path in source.iterdir()), "model-00001-of-00009.safetensors"]
    wanted += ["model.safetensors.index.json", "tokenizer.model", "chat_template.jinja", "adapter_config.json"]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "model.py", "x.gguf"]
    accepted = [name for name in wanted + unwanted if any(Path(name).match(p) for p in options["allow_patterns"])]
    assert accepted == wanted


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", ("gated", "HF_TOKEN")),
        ("RepositoryNotFoundError", ("no such model", "HF_TOKEN")),
        ("RevisionNotFoundError", ("v1", "branch")),
        ("ConnectionError", ("ConnectionError", "local directory")),
    ],
)
def test_hub_errors_show_no_token(error: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(policy.errors, error, ConnectionError)

    def download(*_: Any, **__: Any) -> str:
        failure = kind.__new__(kind)
        failure.args = ("Illegal header value b'Bearer hf_secret'",)
        raise failure

    monkeypatch.setattr(policy, "snapshot_download", download)
    with pytest.raises(InputError) as caught:
        load_pretrained("owner/name", revision="v1")
    assert all(word in str(caught.value) for word in words)
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_export_may_be_read_by_whoever_may_read_its_config(loaded: Policy, tmp_path: Path) -> None:
    save_pretrained(loaded, tmp_path / "export")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "export").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
