"""Arguments of the public functions: what each means by value, and that nothing but `InputError` refuses one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lsp_jax as lsp
from lsp_jax import cli, presets
from lsp_jax import policy as policy_module
from lsp_jax.config import TrainConfig
from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.evaluate import runner
from lsp_jax.evaluate.config import EvaluateConfig
from lsp_jax.evaluate.runner import evaluate
from lsp_jax.model import llama
from lsp_jax.model.llama import Params
from lsp_jax.model.weights import save_params
from lsp_jax.play.decode import Completions, DecodeSpec
from lsp_jax.play.sampler import GREEDY_BELOW, LEAST_TRAINING, SamplingConfig, sample
from lsp_jax.reward.base import HostReward
from lsp_jax.training import loop
from refusal import WeightsRead
from test_trainer import game_config, game_dir
from tiny import VOCABULARY

QUICK_COMPILES = True
CONVERSATION = [{"role": "user", "content": "Hi."}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return game_dir(tmp_path_factory.mktemp("arguments") / "tiny")


@pytest.fixture(scope="module")
def policy(directory: Path) -> lsp.Policy:
    return lsp.load_pretrained(directory)


Asked = list[tuple[list[list[int]], Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The prompts and the key with which programs would have been run; nothing is."""
    calls: Asked = []

    def complete(params: Params, prompts: Any, key: jax.Array, first_row: Any, spec: DecodeSpec) -> Completions:
        tokens, lengths = (np.asarray(x) for x in prompts)
        ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        calls.append((ids, jax.random.key_data(key).tolist()))
        rows, length = len(ids), min(spec.max_new_tokens, 4)
        zeros = np.zeros((rows, length), np.float32)
        ones = np.ones(rows, np.int32)
        return Completions(np.full((rows, length), 40), ones, zeros, zeros, ones > 1)  # pyright: ignore

    monkeypatch.setattr("lsp_jax.play.generate.complete", complete)
    return calls


def refused(function: Callable[..., Any], *given: Any, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*given, **named)
    text = str(caught.value)
    assert text.startswith(f"{caught.value.field} = ") and "\n" not in text
    return text


# --- generate ------------------------------------------------------------------------------------------------------


def test_a_single_prompt_is_a_list_of_one(policy: lsp.Policy, asked: Asked) -> None:
    ids = policy.tokenizer.chat_ids("Hi.")
    forms = ["Hi.", CONVERSATION, ids, tuple(ids), np.asarray(ids), jnp.asarray(ids), np.asarray(ids, np.uint16)]
    for form in forms:
        for prompts in (form, [form], (form,), iter([form])):
            assert len(lsp.generate(policy, prompts)) == 1
            assert asked.pop() == ([ids], [0, 0])
    assert len(lsp.generate(policy, np.asarray([ids, ids]))) == 2 and asked.pop()[0] == [ids, ids]
    mixed = ["Hi.", CONVERSATION, ids]
    assert len(lsp.generate(policy, mixed)) == 3 and asked.pop()[0][:3] == [ids] * 3  # pyright: ignore
    assert lsp.generate(policy, []) == lsp.generate(policy, np.zeros((0, 3), int)) == [] and not asked  # pyright: ignore


BAD_PROMPTS: list[Any] = [
    *(None, 5, 2.5, b"abc", bytearray(b"a"), {"role": "user", "content": "Hi."}, {"a"}, np.int64(3), np.zeros(())),
    *([None], [b"abc"], [5.0], [[5.0]], [[True]], [[5, None]], [["5"]], [["a", "b"]], [np.asarray([5.0])], [{5}]),
    *([[VOCABULARY]], [-1], [5, VOCABULARY], [[2**70]], [np.zeros((2, 2), int)], [[]], [()], [True]),
    *([{"role": "user"}], [{"content": "Hi."}], [{}], [[{"role": "user", "content": None}]], [CONVERSATION, None]),
    *([{"role": 3, "content": "Hi."}], [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]),
    *([*CONVERSATION, "Hi."], [[*CONVERSATION, 5]], [5, "Hi."], ["Hi.", 5], [[5] * 1000], ["\ud800"]),
]


@pytest.mark.parametrize("prompts", BAD_PROMPTS, ids=lambda value: repr(value)[:40])
def test_a_bad_prompt_is_named(policy: lsp.Policy, asked: Asked, prompts: Any) -> None:
    text = refused(lsp.generate, policy, prompts)
    assert text.startswith(("prompts", "text = '\\ud800'", "messages = '\\ud800'")) and not asked


def test_the_place_of_a_bad_prompt_is_named(policy: lsp.Policy) -> None:
    assert refused(lsp.generate, policy, ["a", [5, 999]]).startswith(
        "prompts[1] = 999: token id outside the vocabulary"
    )
    assert refused(lsp.generate, policy, ["a", "b", [5] * 1000]).startswith("prompts[2] length = 1000")


BAD_OPTIONS: dict[str, list[Any]] = {
    "policy": [None, "tiny", {}],
    "sampling": [None, 0.7, {"temperature": 0.7}],
    "max_completion_length": [0, -1, True, 5.0, "5", None, np.float32(5), 10**6, 10**400],
    "seed": [-1, 2**32, 2**70, None, True, 1.0, "1", np.int64(2**40), np.float64(3)],
    "batch_size": [0, -3, None, True, 4.0, "4"],
    "stop_at_eos": [None, 1, 0, "yes"],
}
BAD_SAMPLING: dict[str, list[Any]] = {
    "temperature": [-1, -1e-9, float("nan"), float("inf"), 2.0**127, 10**400, None, "1", True, 1j, Fraction(1, 2)],
    "top_k": [-1, 5.0, None, True, "5", float("nan")],
    "top_p": [0, -0.1, 1.1, float("nan"), None, "1", True],
    "min_p": [-0.1, 1, float("nan"), None, "0", False],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values])
def test_a_bad_option_is_named(policy: lsp.Policy, asked: Asked, name: str, value: Any) -> None:
    options = {"policy": policy, "prompts": ["Hi."], name: value}
    field = "prompts[0] length" if name == "max_completion_length" and isinstance(value, int) and value > 5 else name
    assert refused(lsp.generate, **options).startswith(f"{field} = ") and not asked


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SAMPLING.items() for value in values]
)
def test_a_bad_sampling_is_named(policy: lsp.Policy, name: str, value: Any, tmp_path: Path) -> None:
    sampling = SamplingConfig(**{name: value})
    assert refused(lsp.generate, policy, ["Hi."], sampling).startswith(f"sampling.{name} = ")
    for role in ("sampling", "challenger_sampling"):
        config = replace(game_config("m", tmp_path), **{role: sampling})
        assert refused(config.check).startswith(f"{role}.{name} = ")


def test_numbers_of_numpy_are_numbers(policy: lsp.Policy, asked: Asked) -> None:
    sampling = SamplingConfig(np.float32(0.5), np.int64(7), np.float64(0.9), np.float16(0.25))  # pyright: ignore
    assert lsp.generate(policy, ["Hi."], sampling, max_completion_length=np.int32(3), seed=np.uint32(7)) != []
    assert asked == [([policy.tokenizer.chat_ids("Hi.")], [0, 7])]
    plain = arguments.plain(sampling)
    assert [(type(x), x) for x in dataclasses.astuple(plain)] == [(float, 0.5), (int, 7), (float, 0.9), (float, 0.25)]


def test_every_seed_that_is_taken_has_its_own_noise(policy: lsp.Policy, asked: Asked) -> None:
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    for seed in seeds:
        lsp.generate(policy, ["Hi."], seed=seed)
    assert [key for _, key in asked] == [[0, seed] for seed in seeds]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_of_the_command_line(directory: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(directory), "Hi.", "--seed", str(seed)]) == 2
    assert capsys.readouterr().err == f"lsp-jax: error: seed = {seed}: must be in 0 .. 2**32 - 1\n"


# --- logits that are not finite ------------------------------------------------------------------------------------


def with_weight(params: Params, value: float) -> Params:
    """Copies with one weight of the last norm replaced: of every logit a summand."""
    weight = params["model"]["norm"]["weight"].at[3].set(value)
    return {**params, "model": {**params["model"], "norm": {"weight": weight}}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", [SamplingConfig(0.0), SamplingConfig(0.7, top_k=20, top_p=0.9, min_p=0.01)])
def test_logits_that_are_not_finite_are_said(policy: lsp.Policy, sampling: SamplingConfig, value: float) -> None:
    prompts = ["Hi.", "Ho."]
    assert len(lsp.generate(policy, prompts, sampling, max_completion_length=3)) == 2
    broken = replace(policy, params=with_weight(policy.params, value))
    text = refused(lsp.generate, broken, prompts, sampling, max_completion_length=3)
    assert text.startswith(
        f"model = {policy.source!r}: its logits are not finite at token 1 of the completion of prompts[0]"
    )


def test_the_prompt_and_the_token_with_such_logits_are_named(policy: lsp.Policy) -> None:
    """An embedding that is not finite breaks the rows that read it, from there on."""
    params, ids = policy.params, [40, 41, 42]
    greedy = SamplingConfig(0.0)
    untied = replace(policy.config, tie_word_embeddings=False)
    weight = params["model"]["embed_tokens"]["weight"]
    whole = {**params, "lm_head": {"weight": weight}}
    apart = replace(policy, config=untied, params=whole)
    logits = lsp.forward(whole, untied, jnp.asarray([ids]))
    second = int(jnp.argmax(logits[0, -1]))
    assert second not in ids

    def broken(token: int) -> lsp.Policy:
        table = {"weight": weight.at[token].set(jnp.nan)}
        return replace(apart, params={**whole, "model": {**whole["model"], "embed_tokens": table}})

    options = {"max_completion_length": 3, "stop_at_eos": False}
    assert "token 1 of the completion of prompts[1]:" in refused(
        lsp.generate, broken(200), [ids, [*ids, 200]], greedy, **options
    )
    assert "token 2 of the completion of prompts[0]:" in refused(
        lsp.generate, broken(second), [ids, ids], greedy, **options
    )


def test_the_command_says_so_on_one_line(
    policy: lsp.Policy, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = game_dir(tmp_path / "broken")
    save_params(with_weight(policy.params, float("nan")), policy.config, broken)
    command = ["generate", str(broken), "Hi.", "Ho.", "--max-completion-length", "3"]
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"lsp-jax: error: model = '{broken}': its logits are not finite at token 1 of the")


# --- forward -------------------------------------------------------------------------------------------------------


BAD_TOKENS: list[Any] = [
    *(
        None,
        [[1, 2]],
        "ab",
        b"ab",
        5,
        np.zeros((1, 2)),
        np.zeros((1, 2), bool),
        np.zeros(2, int),
        np.zeros((1, 1, 1), int),
    ),
    *(np.asarray([[VOCABULARY]]), np.asarray([[-1]]), jnp.asarray([[3, VOCABULARY + 5]]), np.asarray([[2**40]])),
]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=lambda value: repr(value)[:30])
def test_forward_refuses_what_are_no_ids(policy: lsp.Policy, tokens: Any) -> None:
    assert refused(lsp.forward, policy.params, policy.config, tokens).startswith("tokens = ")


def test_forward_refuses_other_parameters_and_masks(policy: lsp.Policy) -> None:
    ids = jnp.ones((1, 3), jnp.int32)
    other = replace(policy.config, hidden_size=64)
    integers = jax.tree.map(lambda x: x.astype(int), policy.params)
    assert "must be an array of shape (296, 32)" in refused(lsp.forward, integers, policy.config, ids)
    for params, config in [({}, policy.config), (None, policy.config), (policy, policy.config), (policy.params, other)]:
        assert "model/embed_tokens/weight must be an array of shape" in refused(lsp.forward, params, config, ids)
    assert refused(lsp.forward, policy.params, None, ids).startswith("config = None")
    for mask in (np.ones((1, 3), int), np.ones((1, 2), bool), [[True] * 3], np.ones(3, bool)):
        assert refused(lsp.forward, policy.params, policy.config, ids, mask).startswith("mask = ")


def test_constant_ids_are_looked_at_while_tracing_too(policy: lsp.Policy) -> None:
    good, bad = (jnp.asarray([[5, last]]) for last in (7, VOCABULARY))
    shape = jax.eval_shape(lambda params: lsp.forward(params, policy.config, good), policy.params).shape
    assert shape == (1, 2, VOCABULARY)
    with pytest.raises(InputError, match=f"tokens = {VOCABULARY}"):
        jax.eval_shape(lambda params: lsp.forward(params, policy.config, bad), policy.params)


def test_a_card_is_text(policy: lsp.Policy, tmp_path: Path) -> None:
    for card in (None, 3, b"card", "\ud800"):
        assert refused(lsp.save_pretrained, policy, tmp_path / "out", card=card).startswith("card = ")
    assert not (tmp_path / "out").exists()


# --- configurations --------------------------------------------------------------------------------------------------


def test_temperatures_of_training_and_of_generation(tmp_path: Path) -> None:
    for temperature in (LEAST_TRAINING, 0.6, 1, np.float64(0.7)):
        replace(game_config("m", tmp_path), sampling=SamplingConfig(temperature)).check()  # pyright: ignore
    for temperature in (0, 1e-38, 1e-9, 0.00999):
        SamplingConfig(temperature).check("sampling")
        config = replace(game_config("m", tmp_path), challenger_sampling=SamplingConfig(temperature))
        assert "at least 0.01" in refused(config.check)
        assert SamplingConfig(temperature).greedy == (temperature < GREEDY_BELOW)


def test_a_configuration_has_plain_values(tmp_path: Path) -> None:
    base = game_config("m", tmp_path)
    given = replace(
        base,
        seed=np.int64(3),  # pyright: ignore
        report_to=["wandb"],  # pyright: ignore
        model=Path("m"),  # pyright: ignore
        optimizer=replace(base.optimizer, learning_rate=np.float64(1e-3)),
    )
    expected = replace(base, seed=3, report_to=("wandb",), optimizer=replace(base.optimizer, learning_rate=1e-3))
    plain = arguments.plain(given)
    assert plain == expected and type(plain.seed) is int and type(plain.optimizer.learning_rate) is float
    assert given.to_json() == expected.to_json() and TrainConfig.from_json(given.to_json()) == expected
    assert arguments.plain(base) is base and all(arguments.plain(make()) == make() for make in presets.PRESETS.values())


WRONG_FIELDS: dict[str, list[Any]] = {
    "max_steps": [True, 1.0, "3", None, float("nan")],
    "optimizer": [None, {"learning_rate": 1e-3}, SamplingConfig()],
    "report_to": ["wandb", [1], None, {"wandb"}, b"wandb"],
    "precompile": [1, "yes", None],
    "model": [3, b"m", None],
    "resume": [True, ["auto"], None],
    "stop_timeout": ["1", True, float("nan"), 10**400],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values]
)
def test_a_field_of_another_type_is_named(name: str, value: Any, tmp_path: Path) -> None:
    config = replace(game_config("m", tmp_path), **{name: value})
    assert refused(config.check).startswith(f"{name} = ")
    assert refused(lsp.train, config).startswith(f"{name} = ")


def test_arguments_of_train(tmp_path: Path) -> None:
    config, reward = game_config("m", tmp_path), HostReward("r", "task", 1.0, lambda *_: None)  # pyright: ignore
    assert refused(lsp.train, "quickstart").startswith("config = 'quickstart'")
    for rewards in (reward, [len], [None], "ab", None, [replace(reward, name=3)], [replace(reward, weight="1")]):  # pyright: ignore
        assert refused(lsp.train, config, rewards=rewards).startswith("rewards")
    for callbacks in (print, ["print"], [None], None):
        assert refused(lsp.train, config, callbacks=callbacks).startswith("callbacks")
    for name in ("m", ""):
        given = replace(config, model=name)
        assert refused(lsp.train, given, policy="tiny").startswith("policy = 'tiny'")


# --- anything at all -----------------------------------------------------------------------------------------------


class Odd:
    """Refuses to be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


TEXT = st.text(st.characters(exclude_characters="/"), max_size=8)  # nothing is written outside of the test's folder
NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([1e-38, 1e-46, 1e-9, 1e39, 2**32])
)
ODD: list[Any] = [
    *(
        None,
        b"abc",
        "",
        "\ud800",
        "a\0b",
        "x" * 5000,
        10**400,
        1j,
        Fraction(1, 2),
        Odd(),
        object(),
        int,
        print,
        {1},
        ...,
    ),
    *({}, {"role": "user"}, CONVERSATION, [CONVERSATION], [{"role": "user", "content": None}], [[]], [None], range(3)),
    *(np.int32(3), np.float32(0.5), np.bool_(True), np.str_("a"), np.zeros(()), np.ones((2, 2)), np.ones(2, int)),
    *(
        np.asarray(["a"]),
        np.asarray([None]),
        np.datetime64("2020"),
        Path("p"),
        SamplingConfig(),
        "float32",
        "quickstart",
    ),
]
ANYTHING = st.one_of(
    st.booleans(), NUMBERS, TEXT, st.binary(max_size=4), st.lists(st.one_of(NUMBERS, TEXT), max_size=3),
    st.sampled_from(ODD), st.integers(0, 300).map(np.asarray),
)  # fmt: skip


def begun(*_: Any, **__: Any) -> None:
    raise WeightsRead


def sampled(**fields: Any) -> None:
    """What a sampling that is not refused draws is a token that it kept, with a finite log-probability."""
    config = SamplingConfig(**fields)
    config.check("sampling")
    logits = jnp.asarray([[3.0, -jnp.inf, 1.0, 2.999, -5.0, 3.0]])
    draw = sample(logits, jnp.asarray([[0.3, 0.9]]), arguments.plain(config))
    assert int(draw.token[0]) != 1 and np.isfinite(draw.logprob[0]) and np.isfinite(draw.log_mass[0])
    if config.greedy:
        assert int(draw.token[0]) == 0


def trained(**fields: Any) -> None:
    """A run with one field of its configuration, at any depth, replaced."""
    config: Any = game_config("m", "out")
    name, value = fields["field"], fields["value"]
    room, _, leaf = name.rpartition(".")
    config = replace(config, **{room: replace(getattr(config, room), **{leaf: value})} if room else {name: value})
    lsp.train(config)


def evaluated(**fields: Any) -> None:
    config = EvaluateConfig(("m",), tasks=("gsm8k",), output_dir="out", compilation_cache="")
    evaluate(replace(config, **{fields["field"]: fields["value"]}))


def fields_of(config: Any) -> list[str]:
    names = []
    for field in dataclasses.fields(config):
        inside = getattr(config, field.name)
        names += [
            field.name,
            *(f"{field.name}.{each}" for each in (vars(inside) if dataclasses.is_dataclass(inside) else ())),
        ]
    return names


@pytest.fixture
def cases(
    policy: lsp.Policy, directory: Path, tmp_path: Path, asked: Asked, no_weights: None
) -> Iterator[dict[str, Any]]:
    """By name: a function, good arguments, and what may be put in place of them (default: anything)."""
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        patch.setattr(policy_module, "snapshot_download", lambda *_, **__: 1 / 0)
        patch.setattr(llama, "hidden_states", begun)
        patch.setattr(loop, "setup", begun)
        patch.setattr(loop.processes, "start", lambda config: config.check())
        patch.setattr(loop.runtime, "keep_programs", lambda _: None)
        patch.setattr(loop, "Watchdog", lambda _: nullcontext())
        patch.setattr(runner, "_asked", begun)
        ids = jnp.ones((1, 3), jnp.int32)
        run = {"config": game_config(directory, "out"), "rewards": (), "callbacks": (), "policy": policy}
        fields = {"field": st.sampled_from(fields_of(run["config"]))}
        evaluations = [field.name for field in dataclasses.fields(EvaluateConfig)]
        yield {
            "generate": (lsp.generate, {"policy": policy, "prompts": ["Hi."], "sampling": SamplingConfig(),
                "max_completion_length": 4, "seed": 0, "stop_at_eos": True, "batch_size": 2}, {}),
            "forward": (lsp.forward,
                {"params": policy.params, "config": policy.config, "tokens": ids, "mask": None}, {}),
            "load_pretrained": (lsp.load_pretrained,
                {"path_or_hub_id": directory, "dtype": "float32", "revision": None, "mesh": None}, {}),
            "save_pretrained": (lsp.save_pretrained,
                {"policy": policy, "directory": "out", "dtype": None, "card": ""}, {}),
            "train": (lsp.train, run, {}),
            "TrainConfig": (trained, {"field": "seed", "value": 0}, fields),
            "TrainConfig.load": (TrainConfig.load, {"path": "config.json"}, {}),
            "TrainConfig.from_json": (TrainConfig.from_json, {"text": "{}"}, {}),
            "SamplingConfig": (sampled, {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1}, {}),
            "presets": (presets.get, {"name": "quickstart"}, {}),
            "presets.recommended_lsp": (presets.recommended_lsp, {"size": "3b"}, {}),
            "evaluate": (evaluated, {"field": "seed", "value": 0}, {"field": st.sampled_from(evaluations)}),
        }  # fmt: skip


NAMES = (
    *("generate", "forward", "load_pretrained", "save_pretrained", "train", "TrainConfig", "TrainConfig.load"),
    *("TrainConfig.from_json", "SamplingConfig", "presets", "presets.recommended_lsp", "evaluate"),
)


def test_every_public_name_is_tried() -> None:
    holds_values_only = {"InputError", "Policy"}  # a policy is checked where it is used
    assert set(lsp.__all__) == holds_values_only | {name for name in NAMES if name in lsp.__all__}


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_anything_works_or_is_input_error(name: str, examples: int, cases: dict[str, Any]) -> None:
    function, good, strategies = cases[name]
    outcomes: list[str] = []

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def each(data: st.DataObject) -> None:
        changed = dict(good)
        always = [*strategies, *(["value"] if strategies else [])]
        for argument in always or data.draw(st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=2)):
            changed[argument] = copy.copy(data.draw(strategies.get(argument, ANYTHING)))
        try:
            function(**changed)
            outcomes.append("done")
        except (InputError, WeightsRead) as error:
            outcomes.append(type(error).__name__)

    each()
    assert "InputError" in outcomes
