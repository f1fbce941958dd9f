"""Damaged and absurd input of every kind: it works or is one line of error; it neither hangs nor writes elsewhere.

Configurations, command lines, tokenizers, models, data and GGUF files, each good until hypothesis changes something:
the same inputs every time in `make test`, thousands of new ones in `make test-slow`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from jax.experimental import topologies

from fuzzing import SECONDS, WORDS, Place, any_of, changed, changed_json, sentencepiece
from lsp_jax import cli, policy
from lsp_jax.config import TrainConfig, flat
from lsp_jax.core import processes
from lsp_jax.model import gguf
from lsp_jax.model.weights import load_params, read_config, save_params
from lsp_jax.play.prompt_data import DataConfig, load_data
from lsp_jax.policy import open_pretrained
from lsp_jax.reward import build, code, maths
from lsp_jax.text.judge_prompts import judge_template
from lsp_jax.text.prompts import PlayPrompts, PromptConfig
from lsp_jax.text.tokenizer import Tokenizer
from lsp_jax.training import loop
from refusal import WeightsRead
from test_gguf import tiny_gguf
from test_tokenizer import SENTENCEPIECE_TEMPLATE
from test_trainer import game_config, game_dir
from tiny import tiny_config, tiny_params

FEW, MANY = 60, 600  # inputs of each kind


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("originals"))
    game_dir(place.model)
    config = tiny_config(num_hidden_layers=1)
    shutil.copytree(place.model, place.shards)
    (place.shards / "model.safetensors").unlink()
    save_params(tiny_params(config), config, place.shards, max_shard_bytes=20_000)
    place.pieces.mkdir()
    shutil.copy(place.model / "config.json", place.pieces)
    (place.pieces / "tokenizer.model").write_bytes(sentencepiece())
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "legacy": False}
    names |= {"chat_template": SENTENCEPIECE_TEMPLATE, "added_tokens_decoder": {"270": {"content": "<tool>"}}}
    (place.pieces / "tokenizer_config.json").write_text(json.dumps(names))
    (place.pieces / "added_tokens.json").write_text(json.dumps({"<more>": 271}))
    (place.model / "chat_template.jinja").write_text(
        json.loads((place.model / "tokenizer_config.json").read_text())["chat_template"]
    )
    place.run.mkdir()
    rows = [{"prompt": "Add.", "tests": ["1", "2"], "answer": "3", "test_list": ["assert f"]}, {"prompt": "What?"}]
    place.rows.write_text("".join(json.dumps({"tests": [], **row}) + "\n" for row in rows))
    tiny_gguf(place.gguf)
    return place.root


def begun(*_: Any, **__: Any) -> None:
    raise WeightsRead


@pytest.fixture
def place(originals: Path, tmp_path: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """What would begin long work, other processes or a download raises `WeightsRead` or is refused."""

    def start(config: processes.ProcessConfig) -> None:
        config.check()
        if config.coordinator:
            raise WeightsRead

    place = Place(tmp_path)
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    (place.run / "config.json").write_text(game_config(place.model, place.run).to_json())
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for module, name in ((build, "probe_callable"), (build, "check_sandbox"), (topologies, "get_topology_desc")):
        monkeypatch.setattr(module, name, begun)
    monkeypatch.setattr(policy, "snapshot_download", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(loop, "Watchdog", lambda _: nullcontext())  # it would end this process
    monkeypatch.setattr(gguf, "_demo_gguf", lambda: place.gguf)
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    yield place
    jax.config.update("jax_compilation_cache_dir", cache)


# --- the kinds of input --------------------------------------------------------------------------------------------

Kind = tuple[st.SearchStrategy[Any], Callable[[Any], None]]
"""Inputs, and what is done with one."""


def run_configs(place: Place) -> Kind:
    commands = st.sampled_from([("export", place.run, place.out), ("replay", place.run, "--step", 1)])
    cases = st.tuples(commands, any_of(place.run / "config.json"))
    return cases, lambda case: place.ends(lambda: place.command(*case[0]), *case[1])


def settings_of_train(place: Place) -> Kind:
    options = [f"--{name.replace('_', '-')}" for name in flat(TrainConfig())]
    value = st.one_of(WORDS, st.sampled_from([str(place.rows), str(place.model), str(place.run), "auto"]))
    pairs = st.lists(st.tuples(st.sampled_from(options), value), min_size=1, max_size=3)
    return pairs, lambda case: place.ends(lambda: place.train(*(word for pair in case for word in pair)))


def command_lines(place: Place) -> Kind:
    known = [
        *cli.COMMANDS,
        "--help",
        "--preset",
        "quickstart",
        "--step",
        "--topology",
        "v5e:4x4",
        "--output",
        "--model",
    ]
    word = st.one_of(st.sampled_from([*known, str(place.model), str(place.run), str(place.rows), "out"]), WORDS)
    cases = st.tuples(st.sampled_from(list(cli.COMMANDS)), st.lists(word, max_size=5))

    def attempt(case: tuple[str, list[str]]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf, "_open", begun)
            place.ends(lambda: place.command(case[0], *case[1]))

    return cases, attempt


def opened(directory: Path) -> None:
    """All that a run asks of a tokenizer."""
    tokenizer = open_pretrained(directory)[1].tokenizer
    PlayPrompts.build(tokenizer, PromptConfig(query_prefix="What is "))
    judge_template(tokenizer)
    tokenizer.token_classes()
    assert len(tokenizer.decode(tokenizer.encode("Hello, \ufffd!"))) and tokenizer.vocabulary


def fast_tokenizers(place: Place) -> Kind:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    cases = any_of(*(place.model / name for name in names))
    return cases, lambda case: place.ends(lambda: opened(place.model), *case)


def sentencepieces(place: Place) -> Kind:
    names = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")
    cases = any_of(*(place.pieces / name for name in names))
    return cases, lambda case: place.ends(lambda: opened(place.pieces), *case)


def models(place: Place) -> Kind:
    single = [place.model / name for name in ("config.json", "model.safetensors")]
    cases = any_of(*single, *(path for path in sorted(place.shards.glob("model*")) if "00003" not in path.name))

    def attempt(case: tuple[Path, bytes | None]) -> None:
        directory = case[0].parent

        def load() -> None:
            place.train(model=directory)
            config = read_config(directory)
            config.rope_frequencies()
            load_params(directory, config)

        place.ends(load, *case)

    return cases, attempt


def header_changed(whole: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header is other JSON, its length right."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return changed_json(whole[8:end]).map(lambda text: len(text).to_bytes(8, "little") + text + whole[end:])


def headers(place: Place) -> Kind:
    path = place.model / "model.safetensors"
    load = lambda: load_params(place.model, read_config(place.model))  # noqa: E731
    return header_changed(path.read_bytes()), lambda content: place.ends(load, path, content)


def data_files(place: Place) -> Kind:
    whole = place.rows.read_bytes()
    row = changed_json(whole.splitlines()[0]).map(lambda line: line + b"\n" + whole)
    cases = st.tuples(st.one_of(row, row, changed(whole)), st.booleans())
    tokenizer = Tokenizer.from_pretrained(place.model)

    def attempt(case: tuple[bytes | None, bool]) -> None:
        def load() -> None:
            if case[1]:
                place.train("--data.source", place.rows, "--loss.alpha-challenger", 0)
            data = load_data(DataConfig(str(place.rows), prompt_fields=("prompt", "tests")), tokenizer)
            data.batch(0, 4, seed=0)
            maths.check_rows(data.rows)
            code.check_rows(data.rows)

        place.ends(load, place.rows, case[0])

    return cases, attempt


def gguf_files(place: Place) -> Kind:
    def convert() -> None:
        place.command("demo-model", "out")
        if place.out.exists():  # what is written can be read
            load_params(place.out, read_config(place.out))

    return changed(place.gguf.read_bytes()), lambda content: place.ends(convert, place.gguf, content)


KINDS = (
    *(run_configs, settings_of_train, command_lines, fast_tokenizers, sentencepieces),
    *(models, headers, data_files, gguf_files),
)


def tried(kind: Callable[[Place], Kind], place: Place, inputs: int, start: int | None = None) -> int:
    """How many inputs were really tried; `start` None: the same ones every time."""
    strategy, attempt = kind(place)
    count = 0

    @settings(
        max_examples=inputs,
        derandomize=start is None,
        database=None,
        deadline=timedelta(seconds=2 * SECONDS),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(strategy)
    def each(case: Any) -> None:
        nonlocal count
        count += 1
        attempt(case)

    (each if start is None else seed(start)(each))()
    return count


def test_enough_is_tried():
    assert FEW * len(KINDS) >= 200 and MANY * len(KINDS) >= 2000


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_some_inputs(kind: Callable[[Place], Kind], place: Place):
    assert tried(kind, place, FEW) >= FEW


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs(kind: Callable[[Place], Kind], place: Place):
    start = secrets.randbits(32)
    print(f"seed {start}")  # pytest shows it with a failure
    assert tried(kind, place, MANY, start) >= MANY
