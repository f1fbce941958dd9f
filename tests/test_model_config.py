"""Faults of config.json and generation_config.json, named as theirs; keys that are not implemented are refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.model import llama, weight_files
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.refused_keys import REFUSED_KEYS
from lsp_jax.model.weights import load_params, read_config
from lsp_jax.policy import Policy, load_pretrained, open_pretrained, save_pretrained
from lsp_jax.text.tokenizer import Tokenizer
from test_weights import edit_config, refused
from tiny import EOS, VOCABULARY, tiny_config, tiny_dir, tiny_params, write_tokenizer

CONFIG = tiny_config().to_hf()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


# --- keys that are not implemented ---------------------------------------------------------------------------------

ACTING: dict[str, list[Any]] = {
    "sliding_window": [4, 1023, "4096", True],
    "layer_types": [["full_attention", "sliding_attention"], ["chunked_attention"] * 2, "sliding_attention", []],
    "attention_chunk_size": [8192],
    "attention_window": [512],
    "window_size": [256],
    "is_causal": [False],
    "partial_rotary_factor": [0.5, 0.25, 0],
    "rotary_dim": [4],
    "no_rope_layers": [[1, 0], [0, 0], []],
    "no_rope_layer_interval": [4],
    "position_embedding_type": ["nope", "absolute"],
    "llama_4_scaling_beta": [0.1],
    "mrope_section": [[2, 1, 1]],
    "attention_multiplier": [0.0078125, 1.0, 1],
    "logit_scale": [0.0625],
    "scale_emb": [12],
    "scale_depth": [1.4],
    "dim_model_base": [256],
    "query_pre_attn_scalar": [256, 224.0],
    "mlp_multipliers": [[0.5, 1.0], 2.0],
    "attn_temperature_tuning": [True, 4],
    "hidden_act": ["gelu", "relu2", "gelu_pytorch_tanh", ["silu"]],
    "hidden_activation": ["gelu_pytorch_tanh"],
    "num_kv_shared_layers": [10],
    "per_layer_config": [[{"hidden_size": 8}], {"0": {"hidden_size": 8}}],
    "block_configs": [[{"attention": {"no_op": True}}]],
}
NEUTRAL: dict[str, list[Any]] = {
    "sliding_window": [1024, 4096],
    "layer_types": [["full_attention"] * 2],
    "is_causal": [True],
    "partial_rotary_factor": [1, 1.0],
    "rotary_dim": [8],
    "no_rope_layers": [[1, 1]],
    "no_rope_layer_interval": [0],
    "position_embedding_type": ["rope"],
    "llama_4_scaling_beta": [0],
    "attention_multiplier": [8**-0.5],
    "dim_model_base": [32],
    "query_pre_attn_scalar": [8, 8.0],
    "v_head_dim": [8],
    "mlp_multipliers": [[1.0, 1.0]],
    "attn_temperature_tuning": [False, 0],
    "hidden_act": ["silu", "swish"],
    "hidden_activation": ["silu"],
    "num_kv_shared_layers": [0],
    "per_layer_config": [{}],
    "quantization_config": [{}],
}
BY_WORD: dict[str, tuple[list[Any], list[Any]]] = {
    "false": ([False], [True, 1]),
    "1": ([1, 1.0], [0.5, 12.0, 0, True]),
    "0 or 1": ([0, 1], [2, 8]),
    "null": ([], [1, 0.0, 30.0, True]),
    "the head dimension": ([8], [16]),
}
"""For rows whose words say everything: neutral and acting values."""


@pytest.mark.parametrize("row", REFUSED_KEYS, ids=lambda row: row.key)
def test_a_key_is_refused_where_it_acts(row: Any) -> None:
    neutral, acting = BY_WORD.get(row.neutral, ([], []))
    neutral, acting = [*neutral, *NEUTRAL.get(row.key, ())], [*acting, *ACTING.get(row.key, ())]
    expected = LlamaConfig.from_hf(CONFIG)
    for value in (None, *neutral):
        assert LlamaConfig.from_hf({**CONFIG, row.key: value}) == expected, value
    assert acting
    for value in acting:
        with pytest.raises(InputError) as caught:
            LlamaConfig.from_hf({**CONFIG, row.key: value})
        error = str(caught.value)
        assert (error.startswith(f"{row.key} = ") and "config.json" in error) or "quantised" in error, error
        assert "\n" not in error and (row.families in error or "quantised" in error)


def test_a_window_that_is_switched_off() -> None:
    assert LlamaConfig.from_hf({**CONFIG, "sliding_window": 4, "use_sliding_window": False}) == tiny_config()
    with pytest.raises(InputError, match="sliding_window = 4"):
        LlamaConfig.from_hf({**CONFIG, "sliding_window": 4, "use_sliding_window": True})


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_key_inside_the_rope_object(name: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match=rf"{name}\.partial_rotary_factor = 0\.5"):
        LlamaConfig.from_hf({**CONFIG, "rope_scaling": None, name: rope})


def test_the_documents_have_the_same_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.M)
    assert rows == [(row.key, row.neutral, row.families) for row in REFUSED_KEYS]
    assert len({row.key for row in REFUSED_KEYS}) == len(REFUSED_KEYS)


def test_transformers_has_the_families_keys() -> None:
    """The keys, as fields of the configurations of transformers that the table names; the defaults act."""
    transformers = pytest.importorskip("transformers")
    for family, keys in {
        "GraniteConfig": ["embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"],
        "CohereConfig": ["logit_scale", "use_qk_norm"],
        "Gemma2Config": ["final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"],
        "MistralConfig": ["sliding_window"],
        "SmolLM3Config": ["no_rope_layers", "no_rope_layer_interval"],
        "MixtralConfig": ["num_local_experts"],
    }.items():
        fields = getattr(transformers, family)().to_dict()
        for key in keys:
            assert key in fields and any(row.key == key for row in REFUSED_KEYS), (family, key)
    gemma = transformers.Gemma2Config().to_dict()
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "sliding_window"):
        with pytest.raises(InputError, match=key):
            LlamaConfig.from_hf({**CONFIG, "max_position_embeddings": 8192, key: gemma[key]})


@pytest.mark.parametrize(
    ("quantised", "words"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("quantization_config.quant_method = 'fp8'",)),
        ({"quant_method": "gptq", "bits": 4}, ("quantization_config.quant_method = 'gptq'",)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("'bitsandbytes'", "bfloat16")),
        ({"load_in_8bit": True}, ("quantization_config = {'load_in_8bit': True}",)),
        ("int4", ("quantization_config = 'int4'",)),
    ],
)
def test_quantised_weights(
    model: Path, quantised: Any, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by their method, before a file with weights is opened and before keys that such files have besides."""
    edit_config(model, quantization_config=quantised, pretraining_tp=2, sliding_window=4)
    monkeypatch.setattr(weight_files, "_open", None)
    refused(model, *words, "quantised weights are not supported")


# --- wrong types ---------------------------------------------------------------------------------------------------

WRONG = [True, "3", 3.5, [3], {}, math.nan, None]
FIELDS: dict[str, list[Any]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), WRONG),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), WRONG),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "bos_token_id", "pad_token_id"), WRONG[:-1]),
    "eos_token_id": [True, "2", 2.0, [2.0], [None], [[2]], {}, VOCABULARY, [EOS, 2**30]],
    "rms_norm_eps": [True, "1e-6", [1e-6], -1e-6, math.nan, math.inf, None],
    "initializer_range": [True, "0.02", [0.02], math.nan, None],
    "rope_theta": [True, "10000", [1e4], 0, math.nan, math.inf],
    "tie_word_embeddings": [1, 0, "true", None, [True]],
    "attention_bias": [1, "false", None],
    "mlp_bias": [1, "false", None],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_type_is_blamed_on_config_json(model: Path, field: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "rope_parameters"}
    for value in FIELDS[field]:
        (model / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(InputError) as caught:
            open_pretrained(model)
        error = str(caught.value)
        assert error.startswith(f"{field} = ") and "config.json" in error and "tokenizer" not in error, error


@pytest.mark.parametrize("field", ["bos_token_id", "pad_token_id"])
def test_a_wrong_type_in_generation_config(model: Path, field: str) -> None:
    for value in (True, "3", [3], 3.0, {}):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, field: value}))
        refused(model, f"{field} = {value!r}", "generation_config.json")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "llama", "pad_token_id": [3]}', '{"model_type": "llama", "vocab_size": 1}']
)
def test_the_tokenizer_alone_does_not_look_at_config_json(model: Path, content: str) -> None:
    """No fault of it is the tokenizer's."""
    expected = Tokenizer.from_pretrained(model)
    (model / "config.json").write_text(content)
    found = Tokenizer.from_pretrained(model)
    assert found.encode("What is 1 plus 2?") == expected.encode("What is 1 plus 2?")
    assert found.stop_ids == expected.stop_ids and found.pad_id == expected.pad_id


# --- heads that do not divide the width -----------------------------------------------------------------------------


def test_a_width_that_heads_do_not_divide(tmp_path: Path) -> None:
    """Kanana 1.5 2.1B has one. Logits are those of transformers' modules; only its configuration refuses such sizes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = {**CONFIG, "hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    theirs = transformers.LlamaConfig.from_dict({**fields, "tie_word_embeddings": False})
    object.__setattr__(theirs, "num_attention_heads", 5)
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(theirs).eval()
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    from safetensors.torch import save_file

    write_tokenizer(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = {**fields, "num_attention_heads": 5, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(written))
    policy = load_pretrained(tmp_path)
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (40, 36)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = network(torch.tensor(ids)).logits.numpy()
    found = np.asarray(llama.forward(policy.params, policy.config, jnp.asarray(ids)))
    np.testing.assert_allclose(found, expected, atol=3e-5)
    save_pretrained(policy, tmp_path / "export")
    assert read_config(tmp_path / "export") == policy.config

    (tmp_path / "config.json").write_text(json.dumps({**written, "head_dim": None}))
    refused(tmp_path, "hidden_size = 36", "num_attention_heads (5)", "head_dim")


# --- stop ids --------------------------------------------------------------------------------------------------------


def test_a_stop_id_beyond_the_vocabulary(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, VOCABULARY]}))
    refused(model, f"eos_token_id = {VOCABULARY}", "vocab_size", "generation_config.json")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, VOCABULARY - 1]}))
    assert open_pretrained(model)[1].tokenizer.stop_ids == (EOS, VOCABULARY - 1)
    (model / "generation_config.json").unlink()
    edit_config(model, eos_token_id=[EOS, VOCABULARY])
    refused(model, f"eos_token_id = [{EOS}, {VOCABULARY}]", "vocab_size", "config.json")


@pytest.mark.parametrize(
    ("declared", "in_config", "expected"),
    [
        ({"eos_token_id": EOS, "temperature": 0.5}, EOS, [EOS]),
        ({"eos_token_id": [60, 61], "top_k": 7}, EOS, [EOS, 60, 61]),
        ({"eos_token_id": [61, EOS]}, EOS, [EOS, 61]),
        ({"temperature": 0.5}, [70, 71], [EOS, 70, 71]),
        (None, [70, EOS], [EOS, 70]),
        (None, None, [EOS]),
    ],
)
def test_the_export_has_every_stop_id(
    model: Path, tmp_path: Path, declared: dict[str, Any] | None, in_config: Any, expected: list[int]
) -> None:
    """As transformers reads them from the export; what the file said besides stays, and so does a file with all."""
    file = model / "generation_config.json"
    file.write_text(json.dumps(declared)) if declared else file.unlink()
    edit_config(model, eos_token_id=in_config)
    policy = load_pretrained(model)
    assert list(policy.tokenizer.stop_ids) == expected
    save_pretrained(policy, tmp_path / "export")
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    ids = written["eos_token_id"]
    assert sorted(ids if isinstance(ids, list) else [ids]) == expected
    assert {**written, "eos_token_id": 0} == {**(declared or {"bos_token_id": 1, "pad_token_id": 2}), "eos_token_id": 0}
    if declared and "eos_token_id" in declared and set(np.ravel(declared["eos_token_id"])) == set(expected):
        assert (tmp_path / "export" / "generation_config.json").read_bytes() == file.read_bytes()
    assert load_pretrained(tmp_path / "export").tokenizer.stop_ids == policy.tokenizer.stop_ids
    transformers = pytest.importorskip("transformers")
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert sorted(np.ravel(read.eos_token_id)) == expected


def test_a_policy_of_ones_own(source: Path, tmp_path: Path) -> None:
    """Parameters and configuration from elsewhere than the tokenizer's directory."""
    config = tiny_config(num_hidden_layers=1)
    policy = Policy(config, tiny_params(config), Tokenizer.from_pretrained(source), "here")
    save_pretrained(policy, tmp_path / "export")
    assert load_params(tmp_path / "export", config).keys() == policy.params.keys()
