"""Keys of `config.json` that change a model's arithmetic and are not implemented: refused unless neutral.

`model_type: llama` is often written over a model of another family, and a key that is not read would then be ignored
without a word. `docs/models.md` has the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lsp_jax.core.errors import InputError


@dataclass(frozen=True)
class RefusedKey:
    """One key with the values for which it does nothing, and who uses it."""

    key: str
    """Name in `config.json`, or inside `rope_scaling` and `rope_parameters`."""
    neutral: str
    """The accepted values in words, beside null."""
    families: str
    """Models with this key."""
    is_neutral: Callable[[Any, dict[str, Any]], bool]
    """Whether a value, not null, does nothing in the given `config.json`."""


def _one_of(*values: Any) -> Callable[[Any, dict[str, Any]], bool]:
    """Equal to one of `values`; 1 is 1.0, but not true."""

    def check(value: Any, _: dict[str, Any]) -> bool:
        return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)

    return check


def _all(*values: Any) -> Callable[[Any, dict[str, Any]], bool]:
    """A list with entries, each equal to one of `values`."""
    each = _one_of(*values)
    return lambda value, config: isinstance(value, list) and bool(value) and all(each(one, config) for one in value)


def _head_dim(config: dict[str, Any]) -> Any:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") is not None or type(heads) is not int or type(width) is not int or heads < 1:
        return config.get("head_dim")
    return width // heads


def _equals_head_dim(value: Any, config: dict[str, Any]) -> bool:
    return _one_of(_head_dim(config))(value, config)


def _plain_scale(value: Any, config: dict[str, Any]) -> bool:
    width = _head_dim(config)
    return type(value) is float and type(width) is int and width > 0 and abs(value * width**0.5 - 1) < 1e-6


def _window_spans_context(value: Any, config: dict[str, Any]) -> bool:
    if config.get("use_sliding_window") is False:
        return True
    context = config.get("max_position_embeddings")
    return type(value) is int and type(context) is int and value >= context


_OFF, _ON, _ONE = _one_of(False), _one_of(True), _one_of(1)
_ABSENT = _one_of()
_DENSE = _one_of(0, 1)
_OFF_TEXT, _ONE_TEXT, _NULL, _DENSE_TEXT, _WIDTH = "false", "1", "null", "0 or 1", "the head dimension"
_WINDOW = "at least `max_position_embeddings`, or any with `use_sliding_window` false"

REFUSED_KEYS: tuple[RefusedKey, ...] = (
    # which positions a token sees
    RefusedKey("sliding_window", _WINDOW, "Mistral, Gemma 2, Qwen 2, Phi-3, Cohere 2", _window_spans_context),
    RefusedKey("layer_types", 'all "full_attention"', "Gemma 3, Qwen 3, SmolLM3, GPT-OSS", _all("full_attention")),
    RefusedKey("attention_chunk_size", _NULL, "Llama 4", _ABSENT),
    RefusedKey("attention_window", _NULL, "Longformer, LED", _ABSENT),
    RefusedKey("window_size", _NULL, "GPT-Neo", _ABSENT),
    RefusedKey("is_causal", "true", "Gemma 4", _ON),
    RefusedKey("use_bidirectional_attention", _OFF_TEXT, "Gemma", _OFF),
    RefusedKey("add_cross_attention", _OFF_TEXT, "BERT and other encoders as decoders", _OFF),
    RefusedKey("is_encoder_decoder", _OFF_TEXT, "T5, BART", _OFF),
    # positions
    RefusedKey("partial_rotary_factor", _ONE_TEXT, "Phi, StableLM, GLM, Nemotron, Persimmon", _ONE),
    RefusedKey("rotary_pct", _ONE_TEXT, "GPT-NeoX", _ONE),
    RefusedKey("rotary_dim", _WIDTH, "GPT-J, CodeGen, MiniMax", _equals_head_dim),
    RefusedKey("rope_interleave", _OFF_TEXT, "DeepSeek V3, Mistral 4", _OFF),
    RefusedKey("no_rope_layers", "all 1", "SmolLM3, Llama 4", _all(1, True)),
    RefusedKey("no_rope_layer_interval", "0", "SmolLM3, Llama 4", _one_of(0)),
    RefusedKey("position_embedding_type", '"rope"', "Granite 4 hybrids, ESM", _one_of("rope")),
    RefusedKey("alibi", _OFF_TEXT, "Falcon, MPT", _OFF),
    RefusedKey("use_logn_attn", _OFF_TEXT, "Qwen", _OFF),
    RefusedKey("use_dynamic_ntk", _OFF_TEXT, "Qwen", _OFF),
    RefusedKey("llama_4_scaling_beta", "0", "Ministral 3, Mistral 4", _one_of(0)),
    RefusedKey("mrope_section", _NULL, "Qwen 2.5 VL, GLM-4V", _ABSENT),
    # scales
    RefusedKey("attention_multiplier", "head dimension ** -0.5", "Granite, HyperCLOVA X", _plain_scale),
    RefusedKey("embedding_multiplier", _ONE_TEXT, "Granite, Falcon-H1", _ONE),
    RefusedKey("residual_multiplier", _ONE_TEXT, "Granite, HyperCLOVA X", _ONE),
    RefusedKey("logits_scaling", _ONE_TEXT, "Granite, HyperCLOVA X", _ONE),
    RefusedKey("logit_scale", _ONE_TEXT, "Cohere, MPT", _ONE),
    RefusedKey("scale_emb", _ONE_TEXT, "MiniCPM", _ONE),
    RefusedKey("scale_depth", _NULL, "MiniCPM", _ABSENT),
    RefusedKey(
        "dim_model_base",
        "`hidden_size`",
        "MiniCPM",
        lambda value, config: _one_of(config.get("hidden_size"))(value, {}),
    ),
    RefusedKey("scale_embedding", _OFF_TEXT, "BART, BioGPT", _OFF),
    RefusedKey("lm_head_multiplier", _ONE_TEXT, "Falcon-H1", _ONE),
    RefusedKey("key_multiplier", _ONE_TEXT, "Falcon-H1", _ONE),
    RefusedKey("attention_in_multiplier", _ONE_TEXT, "Falcon-H1", _ONE),
    RefusedKey("attention_out_multiplier", _ONE_TEXT, "Falcon-H1", _ONE),
    RefusedKey("mlp_multipliers", "all 1", "Falcon-H1", _all(1)),
    RefusedKey("query_pre_attn_scalar", _WIDTH, "Gemma 2, Gemma 3", _equals_head_dim),
    RefusedKey("final_logit_softcapping", _NULL, "Gemma 2, Gemma 4", _ABSENT),
    RefusedKey("attn_logit_softcapping", _NULL, "Gemma 2", _ABSENT),
    RefusedKey("logits_soft_cap", _NULL, "RecurrentGemma", _ABSENT),
    RefusedKey("attn_temperature_tuning", "false or 0", "Llama 4", _one_of(False, 0)),
    # layers
    RefusedKey("hidden_act", '"silu" or "swish"', "every family", _one_of("silu", "swish")),
    RefusedKey("hidden_activation", '"silu" or "swish"', "Gemma", _one_of("silu", "swish")),
    RefusedKey("qk_norm", _OFF_TEXT, "original configurations of OLMo 2 and Chameleon", _OFF),
    RefusedKey("use_qk_norm", _OFF_TEXT, "Cohere, Llama 4, GLM-4 MoE", _OFF),
    RefusedKey("qk_layernorm", _OFF_TEXT, "Persimmon, StableLM, Phi", _OFF),
    RefusedKey("clip_qkv", _NULL, "OLMo, DBRX, MPT", _ABSENT),
    RefusedKey("swiglu_limit", _NULL, "GPT-OSS", _ABSENT),
    RefusedKey("attn_output_gate", _OFF_TEXT, "Qwen 3 Next", _OFF),
    RefusedKey("use_parallel_residual", _OFF_TEXT, "GPT-NeoX, StableLM", _OFF),
    RefusedKey("parallel_attn", _OFF_TEXT, "Falcon", _OFF),
    RefusedKey("kv_lora_rank", _NULL, "DeepSeek V2, V3", _ABSENT),
    RefusedKey("q_lora_rank", _NULL, "DeepSeek V2, V3", _ABSENT),
    RefusedKey("v_head_dim", _WIDTH, "DeepSeek V2, V3", _equals_head_dim),
    RefusedKey("num_kv_shared_layers", "0", "Gemma 3n, Gemma 4", _one_of(0)),
    RefusedKey("layer_sharing", _OFF_TEXT, "MobileLLM", _OFF),
    RefusedKey("use_cla", _OFF_TEXT, "Hunyuan", _OFF),
    RefusedKey("num_experts", _DENSE_TEXT, "Qwen MoE, OLMoE", _DENSE),
    RefusedKey("num_local_experts", _DENSE_TEXT, "Mixtral, Llama 4, GPT-OSS", _DENSE),
    RefusedKey("n_routed_experts", _DENSE_TEXT, "DeepSeek V2, V3", _DENSE),
    RefusedKey("moe_num_experts", _DENSE_TEXT, "DBRX, Ernie 4.5 MoE", _DENSE),
    RefusedKey("per_layer_config", _NULL, "layers of different shapes in transformers 5", _one_of({}, [])),
    RefusedKey("block_configs", _NULL, "Nemotron NAS", _one_of([])),
    # weights
    RefusedKey("quantization_config", _NULL, "fp8, GPTQ, AWQ, bitsandbytes and other quantised weights", _one_of({})),
    RefusedKey("compression_config", _NULL, "weights of compressed-tensors", _one_of({})),
)


def check_keys(values: dict[str, Any], config: dict[str, Any], inside: str = "") -> None:
    """Raises InputError for the first key of `values` that is refused.

    `values` is the `config.json` itself, or the object with the key `inside` of it.
    """
    prefix = f"{inside}." if inside else ""
    for method in ("quantization_config", "compression_config"):  # before keys that such files may have besides
        if values.get(method):
            _refuse_quantised(prefix + method, values[method])
    for row in REFUSED_KEYS:
        value = values.get(row.key)
        if value is not None and not row.is_neutral(value, config):
            remedy = f"is not implemented ({row.families}), and must be absent or {row.neutral} in config.json"
            raise InputError(prefix + row.key, value, remedy)


def _refuse_quantised(field: str, value: Any) -> None:
    method = value.get("quant_method") if isinstance(value, dict) else None
    remedy = "quantised weights are not supported; give the model in float32, bfloat16 or float16"
    if method is None:
        raise InputError(field, value, remedy)
    raise InputError(f"{field}.quant_method", method, remedy)
