"""Tokenizer: ids equal to transformers' and tiktoken's on real vocabularies, and bad input refused."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Rust

import llama3_tokenizer
from everyday import everyday
from lsp_jax.core.errors import InputError
from lsp_jax.text.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

TEXTS = [
    "",
    " ",
    "\n",
    "  two spaces, then\ttab\r\n\r\nand lines \n",
    "What is 12345 + 67.890? It's 80,235.89, isn't it?",
    "naïve café, Größe, Ωμέγα, Привет, שלום, مرحبا",
    "日本語のテキスト、한국어, 中文。",
    "emoji 👩‍👩‍👧‍👦🇫🇷 and \u200bzero width, combining e\u0301",
    "def f(x):\n    return x**2  # ≥ 0\n",
    "\u2581 the SentencePiece space \u00a0 and a no-break space",
    "\x00\x01\x7f control characters",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 + 4?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi there \n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! 👋"},
        {"role": "user", "content": "日本語?\n\n"},
    ],
    [{"role": "user", "content": ""}],
]
SENTENCEPIECE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
SENTENCEPIECE_FILES = ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
ALL = [pytest.param("demo", marks=pytest.mark.full), "llama3", "mistral"]  # fixtures
PREFIX_OPTIONS: list[dict[str, Any]] = [{}, {"legacy": True}, {"add_prefix_space": False}]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Random mixtures of scripts, white space, digits and punctuation, 1 to 60 characters."""
    rng = random.Random(seed)
    alphabets = [
        "abcdefgh etaoin",
        "0123456789",
        " \n\t",
        "'.,!?()[]{}<>|/_-+*=",
        "äöüßéñçøłžα",
        "漢字かなカナ한글",
        "👍🏽🎉\u200d",
    ]
    return ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 60))) for _ in range(count)]


def reference(directory: Path, by_score: bool = True) -> Any:
    """transformers' own tokenizer for the same directory.

    transformers 5 orders the merges of a tokenizer.model by id, SentencePiece (and whoever trained with it) by score:
    the two differ before a word that follows two or more spaces. `by_score` gives transformers the file's own order.
    """
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    if by_score and (directory / "tokenizer.model").is_file():
        vocab, _, merges = SentencePieceExtractor(str(directory / "tokenizer.model")).extract()
        tokenizer.backend_tokenizer.model = models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True)
    return tokenizer


def sentencepiece_dir(directory: Path, name: str, **options: Any) -> Path:
    """A directory with a real tokenizer.model from mistral-common and a tokenizer_config.json."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.submodule_search_locations
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(spec.submodule_search_locations[0]) / "data" / name, directory / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"chat_template": SENTENCEPIECE_TEMPLATE} | options
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def tiny_dir(directory: Path) -> Path:
    """A fast tokenizer of five tokens, one of them special though plain characters also merge into it."""
    rust = Rust(models.BPE(vocab={"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, merges=[("<", "e"), ("<e", ">")]))
    rust.add_special_tokens([AddedToken("<e>", special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    rust.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def demo(demo_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(demo_dir)


@pytest.fixture(scope="module")
def llama3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3_tokenizer.build(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def llama3(llama3_dir: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(llama3_dir)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(sentencepiece_dir(tmp_path_factory.mktemp("v3"), SENTENCEPIECE_FILES[1]))


@pytest.mark.full
def test_demo_digits_and_ids(demo: Tokenizer) -> None:
    assert [demo.decode([token]) for token in demo.encode("12345")] == list("12345")
    # digits are cut off before the byte-level split, which otherwise takes the last space before a number with it
    assert [demo.decode([token]) for token in demo.encode("x  12")] == ["x", "  ", "1", "2"]
    assert (demo.vocab_size, demo.bos_id, demo.pad_id, demo.stop_ids) == (49152, 1, 2, (2,))
    assert demo.special_ids == frozenset(range(17))
    assert demo.encode("<|im_start|>user", allow_special=True)[0] == 1


def test_llama3_ids(llama3: Tokenizer) -> None:
    assert (llama3.vocab_size, llama3.bos_id) == (128256, 128000)
    assert llama3.stop_ids == (128001, 128008, 128009)
    assert llama3.special_ids == frozenset(range(128000, 128256))
    assert llama3.pad_id in llama3.stop_ids  # it has no pad token


def test_llama3_equals_tiktoken(llama3: Tokenizer) -> None:
    import tiktoken

    published = tiktoken.Encoding(
        "llama3",
        pat_str=llama3_tokenizer.SPLIT,
        mergeable_ranks=llama3_tokenizer.ranks(),
        special_tokens=llama3_tokenizer.special_tokens(),
    )
    for text in [*TEXTS, *random_texts(400), Path(__file__).read_text(encoding="utf-8")]:
        assert llama3.encode(text) == published.encode_ordinary(text), text
    user = published.encode_ordinary("user\n\n")  # only for its two parts
    assert user == [882, 271]
    header, closed, newlines, turn_end = 128006, 128007, user[1:], 128009
    content = published.encode_ordinary("What is 3 + 4?")
    expected = [128000, header, 882, closed, *newlines, *content, turn_end, header, 78191, closed, *newlines]
    assert llama3.chat_ids("What is 3 + 4?") == expected


@pytest.mark.parametrize("name", ALL)
def test_chat_ids_equal_apply_chat_template(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    theirs = reference(tokenizer.directory)
    for messages in [*CONVERSATIONS, *([{"role": "user", "content": text}] for text in TEXTS)]:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt)["input_ids"]
            assert tokenizer.chat_ids(messages, add_generation_prompt=prompt) == expected
    assert tokenizer.chat_ids("Hi") == tokenizer.chat_ids([{"role": "user", "content": "Hi"}])
    assert tokenizer.chat_ids("Hi") != tokenizer.chat_ids("Ho")


@pytest.mark.full
def test_bos_is_never_doubled(llama3: Tokenizer, mistral: Tokenizer) -> None:
    for tokenizer in (llama3, mistral):
        assert tokenizer.chat_ids("Hi").count(tokenizer.bos_id or 0) == 1
        assert tokenizer.bos_id not in tokenizer.encode("Hi")
    assert reference(llama3.directory)("Hi")["input_ids"][0] == llama3.bos_id  # what a plain call adds


@pytest.mark.parametrize("options", PREFIX_OPTIONS, ids=["first", "legacy", "never"])
@pytest.mark.parametrize("name", everyday(SENTENCEPIECE_FILES, 0), ids=["v1", "v3"])
def test_sentencepiece_equals_transformers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    directory = sentencepiece_dir(tmp_path, name, **options)
    ours, theirs = Tokenizer.from_pretrained(directory), reference(directory)
    assert (ours.vocab_size, ours.bos_id, ours.stop_ids, ours.pad_id) == (len(theirs), 1, (2,), 2)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    joined = [f"<s>{a}</s>{b}<s> [INST] {a}[/INST]<unk>" for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    for text in [*TEXTS, *joined, *random_texts(200)]:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True) == expected, text
        assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False), text
        assert ours.decode(expected, skip_special_tokens=True) == theirs.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == plain, text
    messages = CONVERSATIONS[2]
    assert ours.chat_ids(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    rng = random.Random(1)
    for _ in range(200):  # invalid UTF-8 among byte tokens
        ids = [rng.choice([rng.randint(3, 260), rng.randint(0, 31999)]) for _ in range(6)]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_sentencepiece_equals_unchanged_transformers_on_single_spaces(mistral: Tokenizer) -> None:
    theirs = reference(mistral.directory, by_score=False)
    for text in [*TEXTS, *random_texts(300)]:
        single = re.sub("[ \u2581]+", " ", text)
        messages = [{"role": "user", "content": single.strip(" ")}]
        assert mistral.chat_ids(messages) == theirs.apply_chat_template(messages)["input_ids"], text
        assert (
            mistral.encode(single) == theirs(single, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )


def test_sentencepiece_vocabulary(mistral: Tokenizer) -> None:
    assert mistral.vocabulary == reference(mistral.directory).get_vocab()


def test_sentencepiece_added_tokens(tmp_path: Path) -> None:
    added = {"32000": {"content": "<|im_end|>", "special": True}, "32001": {"content": "<tool>", "special": False}}
    for entry in added.values():
        entry |= {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], added_tokens_decoder=added, eos_token="<|im_end|>")
    ours, theirs = Tokenizer.from_pretrained(directory), reference(directory)
    assert (ours.vocab_size, ours.stop_ids, ours.special_ids) == (32002, (32000,), frozenset({0, 1, 2, 32000}))
    for text in ["Hi<|im_end|>there <tool> x", "<tool><|im_end|>"]:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
        plain = ours.encode(text)
        assert 32001 in plain
        assert 32000 not in plain


@pytest.mark.parametrize("name", ALL)
def test_untrusted_text_never_gives_control_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for token in sorted(tokenizer.special_ids):
        literal = tokenizer.decode([token])
        for text in (literal, f"a{literal}b", f" {literal}\n{literal}"):
            plain = tokenizer.encode(text)
            assert tokenizer.special_ids.isdisjoint(plain), text
            assert tokenizer.decode(plain).strip() == text.strip()
        assert tokenizer.encode(literal, allow_special=True) == [token]


def test_merges_that_build_a_control_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_dir(tmp_path))
    assert tokenizer.encode("e<e>e", allow_special=True) == [1, 4, 1]
    assert tokenizer.encode("e<e>e") == [1, 0, 1, 2, 1]


@pytest.mark.parametrize("name", ALL[:2])
def test_byte_level_round_trip(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    texts = [*TEXTS, *random_texts(300), "a , b . ' s n't"]  # the last is what cleaning up of spaces would change
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


def test_stop_ids_are_the_union(tmp_path: Path) -> None:
    directory = tiny_dir(tmp_path)
    generation = directory / "generation_config.json"
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    for content, expected in [
        ({"eos_token_id": 0}, (0, 4)),
        ({"eos_token_id": [3, 0, 3]}, (0, 3, 4)),
        ({}, (1, 2, 4)),
    ]:
        generation.write_text(json.dumps(content))
        assert Tokenizer.from_pretrained(directory).stop_ids == expected
    generation.unlink()
    assert Tokenizer.from_pretrained(directory).stop_ids == (1, 2, 4)
    generation.write_text(json.dumps({"eos_token_id": "<|im_end|>"}))
    with pytest.raises(InputError, match="eos_token_id"):
        Tokenizer.from_pretrained(directory)
    generation.unlink()
    for name in ("config.json", "tokenizer_config.json"):
        (directory / name).write_text("{}")
    with pytest.raises(InputError, match="no stop token"):
        Tokenizer.from_pretrained(directory)


def test_skip_special_tokens(llama3: Tokenizer) -> None:
    ids = llama3.chat_ids("Hi")
    assert llama3.decode(ids).startswith("<|begin_of_text|><|start_header_id|>user")
    assert llama3.decode(ids, skip_special_tokens=True) == "user\n\nHiassistant\n\n"


@pytest.mark.parametrize("name", ALL)
def test_token_kinds(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    token_classes = tokenizer.token_classes()
    assert (token_classes.dtype, token_classes.shape) == (np.uint8, (tokenizer.vocab_size,))
    assert tokenizer.token_classes() is token_classes
    assert set(np.flatnonzero(token_classes == 2).tolist()) == tokenizer.special_ids
    blank = {token for text in (" ", "\n", "    ", "\t", " \n") for token in tokenizer.encode(text)}
    assert {int(token_classes[token]) for token in blank} == {1}
    words = {token for text in ("Hello", "x7", "👍🏽漢", "é") for token in tokenizer.encode(text)}
    if name == "mistral":
        words -= set(tokenizer.encode(" "))  # the dummy prefix on its own
    assert {int(token_classes[token]) for token in words} == {0}


@pytest.mark.parametrize("name", ALL)
def test_save_copies_byte_for_byte(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "new" / "place")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "new" / "place").iterdir()}
    weights = {"config.json", "model.safetensors"}
    assert saved == {p.name: p.read_bytes() for p in tokenizer.directory.iterdir() if p.name not in weights}
    again = Tokenizer.from_pretrained(tmp_path / "new" / "place")
    again.save(tmp_path / "new" / "place")  # onto itself
    assert again.chat_ids("Hi 42") == tokenizer.chat_ids("Hi 42")
    assert again.stop_ids == tokenizer.stop_ids


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\xff\x00"])
def test_corrupt_tokenizer_json(tmp_path: Path, content: str) -> None:
    directory = tiny_dir(tmp_path)
    (directory / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"tokenizer\.json") as raised:
        Tokenizer.from_pretrained(directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000)])
def test_corrupt_tokenizer_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_corrupt_configs(tmp_path: Path, name: str) -> None:
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0])
    (directory / name).write_text('{"eos_token_id": ')
    with pytest.raises(InputError, match=name):
        Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "<a>"}}},
        {"added_tokens_decoder": {"-1": {"content": "<a>"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}},
        {"added_tokens_decoder": {"32000": {"content": 5}}},
        {"added_tokens_decoder": {"32000": {"content": ""}}},
        {"added_tokens_decoder": {"32000": "<a>"}},
        {"eos_token": "\ud800"},
    ],
)
def test_odd_entries_of_tokenizer_config(tmp_path: Path, fields: dict[str, Any]) -> None:
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], **fields)
    with pytest.raises(InputError, match="token"):
        Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize("content", [{"<a>": None}, {"<a>": [1]}, {"<a>": 2**40}, {"": 32000}])
def test_odd_added_tokens(tmp_path: Path, content: dict[str, Any]) -> None:
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0])
    (directory / "added_tokens.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"added_tokens\.json"):
        Tokenizer.from_pretrained(directory)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    """Nested too deep for Python's reader, and a template in another encoding."""
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0])
    for name, content in (("generation_config.json", b"[" * 100_000), ("chat_template.jinja", b"\xff")):
        (directory / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            Tokenizer.from_pretrained(directory)
        (directory / name).unlink()


def test_a_role_without_a_text(tmp_path: Path) -> None:
    """transformers gives None for its id."""
    directory = tiny_dir(tmp_path)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": ""}))
    tokenizer = Tokenizer.from_pretrained(directory)
    assert (tokenizer.bos_id, tokenizer.special_ids) == (None, {4})
    assert tokenizer.token_classes().tolist() == [0, 0, 0, 0, 2]


def test_stop_ids_that_no_device_holds(tmp_path: Path) -> None:
    directory = tiny_dir(tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2**31}))
    with pytest.raises(InputError, match="eos_token_id"):
        Tokenizer.from_pretrained(directory)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    """What bytes on a command line become when they are not UTF-8."""
    fast = tiny_dir(tmp_path / "fast")
    (fast / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for directory in (fast, sentencepiece_dir(tmp_path / "piece", SENTENCEPIECE_FILES[0])):
        tokenizer = Tokenizer.from_pretrained(directory)
        for ask in (tokenizer.encode, tokenizer.chat_ids, lambda text, t=tokenizer: t.dated(text).chat_ids("Hi")):
            with pytest.raises(InputError, match="surrogate"):
                ask("a\udcffb")


def test_chat_template_missing_or_refusing(tmp_path: Path) -> None:
    fast = tiny_dir(tmp_path / "fast")
    piece = sentencepiece_dir(tmp_path / "piece", SENTENCEPIECE_FILES[0], chat_template=None)
    for directory in (fast, piece):
        with pytest.raises(InputError, match=r"chat_template\.jinja"):
            Tokenizer.from_pretrained(directory).chat_ids("Hi")
        for template, match in [
            ("{{ raise_exception('roles must alternate') }}", "alternate"),
            ("{% if %}", "rejected"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{{ messages.nothing() }}", "rejected"),
        ]:
            (directory / "chat_template.jinja").write_text(template)
            with pytest.raises(InputError, match=match):
                Tokenizer.from_pretrained(directory).chat_ids("Hi")
        with pytest.raises(InputError, match="at least one"):
            Tokenizer.from_pretrained(directory).chat_ids([])


def test_import_is_cheap() -> None:
    code = "import sys, lsp_jax.text.tokenizer; print({'transformers', 'sentencepiece', 'torch'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
