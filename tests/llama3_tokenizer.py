"""Llama 3's real vocabulary, from the package llama-models (tiktoken form), as a Hugging Face tokenizer directory."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STOP_IDS = [128001, 128008, 128009]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def ranks() -> dict[bytes, int]:
    """The 128000 byte strings of the published file, with their ranks (= ids)."""
    spec = importlib.util.find_spec("llama_models")  # found, not imported: importing it needs more packages
    assert spec is not None
    assert spec.submodule_search_locations
    lines = (Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model").read_text().splitlines()
    pairs = [line.split() for line in lines if line]
    return {base64.b64decode(text): int(rank) for text, rank in pairs}


def special_tokens() -> dict[str, int]:
    """The 256 special tokens of Llama 3.1 and 3.2, ids 128000 to 128255."""
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    named += ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
    named += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(3, 248)]
    return {text: 128000 + index for index, text in enumerate(named + reserved)}


def build(directory: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json into `directory`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = _vocab_and_merges(ranks())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens()])
    # As in the published file, a plain call adds the BOS: what must not happen twice is tested against that.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 131072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 128000, "eos_token_id": STOP_IDS}))
    return directory


def _vocab_and_merges(rank_of: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """tiktoken joins the neighbours that make the lowest-ranked token: a merge of that rank for every split of it."""
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in rank_of}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(rank_of, key=rank_of.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in rank_of and token[cut:] in rank_of
    ]
    return {spelled[token]: rank for token, rank in rank_of.items()}, merges


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself where visible in Latin-1, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + index) for index, byte in enumerate(hidden)}
