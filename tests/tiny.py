"""Tiny random Llamas for tests: `tiny_dir` writes one with this package alone, `hf_tiny` one with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params, params_shape
from lsp_jax.model.weights import save_params

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRA = ("What is ", "The answer is ", "Yes", "No", " the", " is", "What", "Add", " plus", " and", "user", "assistant")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS, EOS = 1, 2
VOCABULARY = 296
"""Tokens of `byte_tokenizer`, and rows of the embedding of a tiny Llama: every id it can sample has a text."""


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE: three special tokens, the 256 bytes, and the merges that spell `EXTRA`; always the same ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    merges: list[tuple[str, str]] = []
    for text in EXTRA:
        for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
            left = word[0]
            for right in word[1:]:
                if left + right not in vocabulary:
                    vocabulary[left + right] = len(vocabulary)
                    merges.append((left, right))
                left += right
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert len(vocabulary) == VOCABULARY
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write_tokenizer(directory: str | Path) -> int:
    """Writes tokenizer files, chat template and `generation_config.json`; returns the vocabulary's size."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[EOS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return tokenizer.get_vocab_size()


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Two layers of width 32 over the vocabulary of `byte_tokenizer`; any field may be overridden.

    Weights are large enough (standard deviation 0.3) that distributions are far from uniform.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": BOS,
        "eos_token_id": (EOS,),
        "pad_token_id": EOS,
    }
    return LlamaConfig(**{**fields, **overrides})


def tiny_params(config: LlamaConfig, seed: int = 0) -> Params:
    """Random float32 parameters with norms around 1 and biases around 0, so that both matter. Drawn by numpy: fast."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, scale = (1.0, 0.2) if "norm" in name else (0.0, 0.2 if "bias" in name else config.initializer_range)
        return jnp.asarray(random.normal(mean, scale, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, params_shape(config))


def tiny_dir(directory: str | Path, seed: int = 0, **config_overrides: Any) -> Path:
    """A whole Hugging Face directory of a random tiny Llama with tokenizer and ChatML template, made without torch."""
    config = tiny_config(**config_overrides)
    save_params(tiny_params(config, seed), config, directory)
    write_tokenizer(directory)
    return Path(directory)


def stopping_dir(directory: str | Path) -> Path:
    """A `tiny_dir` with so many stop ids that random weights stop at various lengths."""
    directory = tiny_dir(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, *range(60, 90)]}))
    return directory


def hf_classifier(directory: str | Path, seed: int = 0, **config: Any) -> Any:
    """A random tiny `LlamaForSequenceClassification` over `byte_tokenizer`, with its files; needs torch.

    One label unless `config` says otherwise. A reward model without torch: `tiny_dir(directory, head="score")`.
    """
    fields = {"vocab_size": VOCABULARY, "num_labels": 1, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    model = hf_tiny(directory, seed, "LlamaForSequenceClassification", **{**fields, **config})
    write_tokenizer(directory)
    return model


def hf_tiny(directory: str | Path, seed: int = 0, architecture: str = "LlamaForCausalLM", **config: Any) -> Any:
    """A random tiny Llama of transformers' class `architecture`, float32, saved to `directory`; needs torch.

    `config` are fields of transformers' own LlamaConfig. Norm weights and biases are randomised so that they matter.
    """
    import pytest

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(transformers.LlamaConfig(**{**fields, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model
