"""Files of a tokenizer that say more than its class: steps, options of added tokens, pad tokens, templates, dates."""

from __future__ import annotations

import json
import locale
import os
import random
import shutil
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust

from everyday import everyday
from lsp_jax.core.errors import InputError
from lsp_jax.policy import open_pretrained
from lsp_jax.text.chat_template import clock, today
from lsp_jax.text.tokenizer import Tokenizer
from test_tokenizer import SENTENCEPIECE_FILES, reference, sentencepiece_dir
from tiny import CHATML, VOCABULARY, tiny_dir

os.environ["HF_HUB_OFFLINE"] = "1"

PROBES = [
    "123",
    "Hello 12345",
    "hello  world",
    "HELLO",
    "e\u0301 \u00e9",
    " lead",
    "trail ",
    "\n\nx",
    "\u65e5\u672c",
    "\U0001f44d\U0001f3fd",
    "<s>hi</s> 12",
    "a <s>  b",
]
N, P = normalizers, pre_tokenizers
STEPS: dict[str, tuple[Any, Any]] = {
    "digits": (None, P.Sequence([P.Metaspace(), P.Digits(individual_digits=True)])),
    "nfc": (N.NFC(), P.Metaspace()),
    "lower": (N.Lowercase(), P.Metaspace(split=False)),
    "prepend": (N.Sequence([N.Prepend("\u2581"), N.Replace(" ", "\u2581")]), None),
    "strip": (N.Sequence([N.NFKC(), N.Strip()]), P.Metaspace()),
    "never": (None, P.Metaspace(prepend_scheme="never", split=False)),
}


def metaspace_dir(directory: Path, steps: tuple[Any, Any], **settings: Any) -> Path:
    """A small BPE with byte fallback and the given normalizer and pre-tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += list("\u2581abcdehilmnorstvwxyHELO0123456789\u00e9.,?!")
    merges = [("1", "2"), ("12", "3"), ("e", "l"), ("\u2581", "\u2581"), ("\u2581", "1"), ("l", "o"), ("\u2581", "h")]
    vocab = {text: index for index, text in enumerate([*texts, *(a + b for a, b in merges)])}
    rust = Rust(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer, pre_tokenizer = steps
    if normalizer is not None:
        rust.normalizer = normalizer
    if pre_tokenizer is not None:
        rust.pre_tokenizer = pre_tokenizer
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(parts)
    rust.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts[:3]])
    rust.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizerFast"}
    settings = {**names, "chat_template": CHATML, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


# --- the steps of a tokenizer.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "NoSuchTokenizer", None])
@pytest.mark.parametrize("steps", everyday(STEPS, 0, 1))
def test_tokenizer_json_decides_every_step(tmp_path: Path, steps: str, name: str | None) -> None:
    """Whatever class is named: transformers 5 makes another tokenizer of it, except from what is exported here."""
    from transformers import AutoTokenizer

    directory = metaspace_dir(tmp_path / "model", STEPS[steps], tokenizer_class=name)
    file = Rust.from_file(str(directory / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(directory)
    ours.save(tmp_path / "export")
    shutil.copyfile(directory / "config.json", tmp_path / "export" / "config.json")
    again, theirs = Tokenizer.from_pretrained(tmp_path / "export"), AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for text in PROBES:
        expected = file.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == expected, text
        assert again.encode(text, allow_special=True) == expected, text
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected, text
        assert ours.decode(expected) == file.decode(expected, skip_special_tokens=False)
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_roles_of_a_class_are_kept(tmp_path: Path) -> None:
    """LlamaTokenizer has <s>, </s> and <unk> without an entry for them."""
    from transformers import AutoTokenizer

    directory = metaspace_dir(tmp_path / "model", STEPS["digits"])
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    theirs, ours = AutoTokenizer.from_pretrained(directory), Tokenizer.from_pretrained(directory)
    assert (ours.bos_id, ours.stop_ids, ours.special_ids) == (1, (2,), {0, 1, 2})
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    ours.save(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported.special_tokens_map == theirs.special_tokens_map
    assert exported("12 3", add_special_tokens=False)["input_ids"] == ours.encode("12 3")


def test_random_merges_are_refused(tmp_path: Path) -> None:
    directory = metaspace_dir(tmp_path, STEPS["digits"])
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.1
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"dropout = 0.1.*random"):
        Tokenizer.from_pretrained(directory)


# --- options of added tokens beside a tokenizer.model -------------------------------------------------------------


def test_options_of_added_tokens(tmp_path: Path) -> None:
    options = ({}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True})
    options += ({"normalized": True}, {"lstrip": True, "single_word": True})
    added: dict[str, Any] = {}
    for index, more in enumerate(options):
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **more}
        added[str(32000 + index)] = {"content": f"<t{index}>", "special": index % 2 == 0, **flags}
        added[str(32050 + index)] = {"content": f"tok{index}", "special": index % 2 == 1, **flags}
    added["2"] = {"content": "</s>", "special": True, **flags}
    gaps = [id_ for id_ in range(32000, 32057) if str(id_) not in added]
    added |= {str(id_): {"content": f"<gap{id_}>", "special": True, **flags} for id_ in gaps}
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], added_tokens_decoder=added)
    ours, theirs = Tokenizer.from_pretrained(directory), reference(directory)
    rng = random.Random(0)
    spelled = [entry["content"] for entry in added.values() if "gap" not in entry["content"]]
    parts = [*spelled, " ", "  ", "\t", "\n", "a", "e\u0301", "_", "\u00b2", "\u200d", "5", ".", "\u2581", "\u00a0"]
    texts = [f" {text} x" for text in spelled] + [f"a{text}b" for text in spelled]
    texts += ["".join(rng.choice(parts) for _ in range(rng.randint(1, 9))) for _ in range(400)]
    for text in texts:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"], text
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == plain, text
    vocabulary = ours.vocabulary
    assert ours.encode("a  <t3>  b", allow_special=True) == [vocabulary["\u2581a"], 32003, vocabulary["b"]]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
def test_options_of_a_role(tmp_path: Path, where: str) -> None:
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], eos_token="</s>")
    role = {"content": "</s>", "lstrip": True, "rstrip": True, "single_word": False, "normalized": False}
    path = directory / where
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | {"eos_token": role}))
    ours = Tokenizer.from_pretrained(directory)
    vocabulary = ours.vocabulary
    assert ours.encode("a </s> b", allow_special=True) == [*ours.encode("a"), 2, vocabulary["b"]]
    role["lstrip"] = "yes"
    path.write_text(json.dumps({"eos_token": role}))
    with pytest.raises(InputError, match="lstrip"):
        Tokenizer.from_pretrained(directory)


# --- a pad token beyond the embedding -----------------------------------------------------------------------------


def with_surplus(directory: Path, *texts: str, **settings: str) -> Path:
    """A tiny model whose tokenizer has further tokens, from id VOCABULARY on."""
    tiny_dir(directory)
    rust = Rust.from_file(str(directory / "tokenizer.json"))
    rust.add_special_tokens([AddedToken(text, special=True) for text in texts])
    rust.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return directory


def test_a_pad_token_beyond_the_embedding(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, plain = open_pretrained(tiny_dir(tmp_path / "plain"))
    directory = with_surplus(tmp_path / "padded", "<pad>", pad_token="<pad>")
    _, padded = open_pretrained(directory)
    warned = capfd.readouterr().err
    assert "'<pad>' (296)" in warned and warned.count("\n") == 1
    ours = padded.tokenizer
    assert (ours.vocab_size, ours.pad_id, ours.stop_ids) == (VOCABULARY, 2, (2,))
    assert ours.special_ids == plain.tokenizer.special_ids and ours.vocabulary == plain.tokenizer.vocabulary
    assert (ours.token_classes() == plain.tokenizer.token_classes()).all()
    assert ours.chat_ids("Hi <pad") == plain.tokenizer.chat_ids("Hi <pad")
    assert ours.encode("<pad>") == plain.tokenizer.encode("<pad>")
    for ask in (ours.chat_ids, ours.dated("26 Jul 2024").chat_ids, lambda text: ours.encode(text, allow_special=True)):
        with pytest.raises(InputError, match=r"token id = 296.*<pad>"):
            ask("Hi <pad>")
    ours.save(tmp_path / "export")
    assert Tokenizer.from_pretrained(tmp_path / "export").within(VOCABULARY).pad_id == 2


def test_any_other_surplus_is_refused(tmp_path: Path) -> None:
    named = with_surplus(tmp_path / "two", "<pad>", "<tool>", pad_token="<pad>")
    with pytest.raises(InputError, match=r"'<tool>' \(297\).*another model"):
        open_pretrained(named)
    stop = with_surplus(tmp_path / "stop", "<pad>", pad_token="<pad>", eos_token="<pad>")
    with pytest.raises(InputError, match=r"'<pad>' \(296\).*another model"):
        open_pretrained(stop)
    shown = with_surplus(tmp_path / "shown", "<pad>", pad_token="<pad>", chat_template=CHATML + "{{ pad_token }}")
    with pytest.raises(InputError, match=r"'<pad>' \(296\).*another model"):
        open_pretrained(shown)


def test_pad_of_a_tokenizer_model(tmp_path: Path) -> None:
    added = {"32000": {"content": "[PAD]", "special": True}}
    directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], added_tokens_decoder=added, pad_token="[PAD]")
    ours = Tokenizer.from_pretrained(directory)
    assert (ours.vocab_size, ours.pad_id) == (32001, 32000)
    limited = ours.within(32000)
    assert (limited.vocab_size, limited.pad_id) == (32000, 2)
    with pytest.raises(InputError, match="32000"):
        limited.chat_ids("[PAD]")
    assert ours.within(32001) is ours


# --- which file is at fault ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "tool_use", "template": "x"}]},
            ["chat_template", "tool_use"],
        ),
        ("tokenizer_config.json", {"chat_template": {"rag": "x", "tools": "y"}}, ["chat_template", "'rag, tools'"]),
        ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}, ["chat_template", "name"]),
        ("tokenizer_config.json", {"chat_template": [7]}, ["chat_template", "name"]),
        ("tokenizer_config.json", {"chat_template": 7}, ["chat_template = 7"]),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 7}]}, ["chat_template = 7"]),
        ("tokenizer_config.json", {"chat_template": "{{ ['a', 'b'] | random }}"}, ["chat_template", "random"]),
        ("tokenizer_config.json", {"chat_template": "{{ lipsum(1) }}"}, ["chat_template", "random"]),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<s>"}}, ["does not fit", "added_tokens_decoder"]),
        ("tokenizer_config.json", {"padding_side": "up"}, ["does not fit", "Padding side"]),
        ("special_tokens_map.json", "[", ["not valid JSON"]),
        ("added_tokens.json", "{", ["not valid JSON"]),
        ("tokenizer_config.json", "[]", ["JSON object"]),
        ("tokenizer.json", "{}", ["cannot be read"]),
    ],
)
def test_the_file_at_fault_is_named(tmp_path: Path, name: str, change: Any, words: list[str]) -> None:
    directory = metaspace_dir(tmp_path, STEPS["digits"])
    text = change if isinstance(change, str) else json.dumps(json.loads((directory / name).read_text()) | change)
    (directory / name).write_text(text)
    with pytest.raises(InputError) as raised:
        Tokenizer.from_pretrained(directory)
    message = str(raised.value)
    assert all(word in message for word in [name, *words]) and "\n" not in message, message


def test_config_json_is_not_read_by_the_tokenizer(tmp_path: Path) -> None:
    """transformers' AutoTokenizer reads it, and refuses a model that is none of the tokenizer's business."""
    directory = metaspace_dir(tmp_path, STEPS["digits"])
    fields = {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 24, "head_dim": 128}
    for more in ({"pad_token_id": [3]}, {"transformers_version": "x"}, {"rope_scaling": 7}, {"model_type": 5}):
        (directory / "config.json").write_text(json.dumps(fields | more))
        assert Tokenizer.from_pretrained(directory).stop_ids == (2,)


def test_named_templates_with_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "<s>{{ messages[0].content }}"}]
    for template in (named, {entry["name"]: entry["template"] for entry in named}):
        fast = metaspace_dir(tmp_path / "fast", STEPS["digits"], chat_template=template)
        piece = sentencepiece_dir(tmp_path / "piece", SENTENCEPIECE_FILES[0], chat_template=template)
        for directory in (fast, piece):
            tokenizer = Tokenizer.from_pretrained(directory)
            assert tokenizer.chat_ids("e") == tokenizer.encode("<s>e", allow_special=True)
    folder = fast / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("x")
    assert Tokenizer.from_pretrained(fast).chat_ids("e")[0] == 1
    (fast / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"chat_template = 'rag'.*additional_chat_templates"):
        Tokenizer.from_pretrained(fast)


# --- dates ----------------------------------------------------------------------------------------------------------

FORMS = ["%d %b %Y", "%Y-%m-%d", "%A, %B %d, %Y", "%a %-d %h %y %H:%M:%S %p %I %j %U %%d %c", "%x %X %r %D %F", "%Z%z."]


def test_strftime_now_of_a_fixed_day() -> None:
    for day, text in [(datetime(2024, 7, 26), "26 Jul 2024"), (datetime(2026, 3, 1), "1 March 2026")]:
        for form in FORMS:
            assert clock(text)(form) == day.strftime(form), form
    assert clock("01 Jan 1970")("%s") == "0"
    for text in ("2024-07-26", "31 Feb 2024", "26 Jux 2024", ""):
        with pytest.raises(InputError, match=r"date = .*26 Jul 2024"):
            clock(text)("%d")


def test_dates_do_not_depend_on_locale_or_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = locale.setlocale(locale.LC_TIME)
    expected = [clock("26 Jul 2024")(form) for form in (*FORMS, "%s")]
    try:
        for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8"):
            with suppress(locale.Error):
                locale.setlocale(locale.LC_TIME, name)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert [clock("26 Jul 2024")(form) for form in (*FORMS, "%s")] == expected
        assert datetime.strptime(today(), "%d %b %Y").date() == datetime.now().date() or name != "C.UTF-8"
    finally:
        locale.setlocale(locale.LC_TIME, before)
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("kind", ["fast", "piece"])
def test_a_dated_tokenizer_reads_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import transformers.utils.chat_template_utils as templates

    template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    if kind == "fast":
        directory = metaspace_dir(tmp_path, STEPS["digits"], chat_template=template)
    else:
        directory = sentencepiece_dir(tmp_path, SENTENCEPIECE_FILES[0], chat_template=template)
    tokenizer = Tokenizer.from_pretrained(directory)
    expected = tokenizer.encode("2024-07-26 Hi", allow_special=True)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 1, 2)

    monkeypatch.setattr(templates, "datetime", Later)
    assert tokenizer.dated("26 Jul 2024").chat_ids("Hi") == expected
    assert tokenizer.chat_ids("Hi") == tokenizer.encode("2031-01-02 Hi", allow_special=True)
    with pytest.raises(InputError, match="date = 'Friday'"):
        tokenizer.dated("Friday").chat_ids("Hi")
