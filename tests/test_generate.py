"""Generation: the compiled rollout against plain full forwards, transformers, and the learner's log-probabilities."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
from everyday import everyday
from lsp_jax.core.errors import InputError
from lsp_jax.learn.batch import Sampled, make_rows
from lsp_jax.learn.logprobs import completion_hidden, completion_tokens, token_statistics
from lsp_jax.model import llama
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.play.decode import Completions, DecodeSpec, continue_prompts
from lsp_jax.play.generate import complete
from lsp_jax.play.sampler import SamplingConfig, row_keys
from tiny import stopping_dir, tiny_config, tiny_params

QUICK_COMPILES = True  # the time goes into compiling
CONFIG = tiny_config()
GREEDY = SamplingConfig(temperature=0)
SAMPLINGS = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01),
    SamplingConfig(),
    SamplingConfig(top_k=20),
    SamplingConfig(top_p=0.8),
    SamplingConfig(min_p=0.05),
]


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG)


def ragged_prompts(rows: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows).astype(np.int32)
    lengths[0] = width
    # padding holds ids like any other: no mask may look at it
    return rng.integers(0, CONFIG.vocab_size, (rows, width)).astype(np.int32), lengths


def run(
    params: llama.Params,
    tokens: np.ndarray,
    lengths: np.ndarray,
    sampling: SamplingConfig = GREEDY,
    repeats: int = 1,
    columns: int = 10,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    first_row: int = 0,
) -> Completions:
    spec = DecodeSpec(CONFIG, sampling, columns, stop_ids)
    prompts, key = (jnp.asarray(tokens), jnp.asarray(lengths)), jax.random.key(seed)
    return complete(params, prompts, key, jnp.int32(first_row), spec, repeats)


def test_greedy_equals_full_forwards_without_cache(params: llama.Params) -> None:
    tokens, lengths = ragged_prompts(4, 9)
    out = run(params, tokens, lengths)
    forward = jax.jit(partial(llama.forward, config=CONFIG))
    for row, length in enumerate(lengths):
        ids = tokens[row, :length].tolist()
        for _ in range(10):
            padded = jnp.asarray([ids + [0] * (20 - len(ids))])
            ids.append(int(jnp.argmax(forward(params, tokens=padded)[0, len(ids) - 1])))
        assert out.tokens[row].tolist() == ids[length:]


@pytest.mark.parametrize("sampling", everyday(SAMPLINGS, 1), ids=str)
@pytest.mark.parametrize("repeats", everyday((3, 1), 0))
def test_sampler_logprobs_equal_the_learners(params: llama.Params, sampling: SamplingConfig, repeats: int) -> None:
    prompts, lengths = ragged_prompts(4, 9)
    out = run(params, prompts, lengths, sampling, repeats, columns=12, stop_ids=tuple(range(40)))
    assert len(set(out.lengths.tolist())) > 1, "the rows must have different lengths for this test to say anything"
    rows = make_rows(
        (jnp.repeat(prompts, repeats, axis=0), jnp.repeat(lengths, repeats)),
        Sampled(out.tokens, out.lengths, out.logprobs, out.log_mass),
        jnp.ones(out.lengths.shape),
        jnp.ones(out.lengths.shape, bool),
        1.0,
        "sequence",
    )
    hidden = completion_hidden(params, CONFIG, rows)
    learner = token_statistics(params, CONFIG, hidden, completion_tokens(rows), sampling.temperature, 64)
    gap = np.where(rows.mask, learner.logprobs - rows.log_mass - rows.behaviour_logprobs, 0)
    assert np.abs(gap).max() < 1e-4
    assert bool(jnp.any(out.log_mass < -1e-3)) == sampling.truncates
    wrong = np.where(rows.mask, learner.logprobs * 1.01 - rows.log_mass - rows.behaviour_logprobs, 0)
    assert np.abs(wrong).max() > 1e-4


@pytest.mark.full
def test_rows_end_at_their_stop_token_and_nothing_follows(params: llama.Params) -> None:
    tokens, lengths = ragged_prompts(8, 9)
    free = run(params, tokens, lengths, SamplingConfig(), columns=16)
    stop_ids = (int(free.tokens[0, 2]), int(free.tokens[1, 5]))
    out = run(params, tokens, lengths, SamplingConfig(), columns=16, stop_ids=stop_ids)
    for row in range(8):
        expected = free.tokens[row].tolist()
        hits = [i for i, token in enumerate(expected) if token in stop_ids]
        length = hits[0] + 1 if hits else 16
        assert out.lengths[row] == length
        assert bool(out.stopped[row]) == bool(hits)
        assert out.tokens[row].tolist() == expected[:length] + [0] * (16 - length)
        assert not np.any(out.logprobs[row, length:]) and not np.any(out.log_mass[row, length:])
    assert out.lengths[0] <= 3 and out.lengths[1] <= 6


def test_loop_ends_when_every_row_has_stopped(params: llama.Params) -> None:
    tokens, lengths = ragged_prompts(3, 5)
    out = run(params, tokens, lengths, stop_ids=tuple(range(CONFIG.vocab_size)))
    assert out.lengths.tolist() == [1, 1, 1] and bool(jnp.all(out.stopped))
    one = run(params, tokens, lengths, columns=1)
    assert one.tokens.shape == (3, 1) and one.lengths.tolist() == [1, 1, 1] and not bool(jnp.any(one.stopped))


@pytest.mark.full
def test_padding_and_batch_change_no_row(params: llama.Params) -> None:
    tokens, lengths = ragged_prompts(6, 9)
    out = run(params, tokens, lengths, SamplingConfig(), columns=8)
    wider = np.concatenate([tokens, np.full((6, 7), 5, np.int32)], axis=1)
    more = run(params, wider, lengths, SamplingConfig(), columns=8)
    assert more.tokens.tolist() == out.tokens.tolist()
    np.testing.assert_allclose(more.logprobs, out.logprobs, atol=1e-5)
    tail = run(params, tokens[4:], lengths[4:], SamplingConfig(), columns=8, first_row=4)
    assert tail.tokens.tolist() == out.tokens[4:].tolist()


@pytest.mark.full
def test_several_prefixes_continue_as_the_whole_prompt(params: llama.Params) -> None:
    """One beginning for all, two middles, four ends with two rows each: as eight prompts in one piece."""
    parts = [ragged_prompts(rows, width, seed) for seed, (rows, width) in enumerate(((1, 5), (2, 7), (4, 6)))]
    prefixes: tuple[KVCache, ...] = ()
    for tokens, lengths in parts:
        hidden, cache = jax.jit(llama.extend, static_argnums=1)(params, CONFIG, tokens, lengths, prefixes)
        prefixes = (*prefixes, cache)
    whole = np.zeros((4, 18), np.int32)
    lengths = np.zeros(4, np.int32)
    for row in range(4):
        pieces = [part[row * len(part) // 4][: size[row * len(part) // 4]] for part, size in parts]
        lengths[row] = sum(map(len, pieces))
        whole[row, : lengths[row]] = np.concatenate(pieces)
    assert len(set(lengths.tolist())) > 1
    sampling = SamplingConfig(temperature=0.7)
    keys = row_keys(jax.random.key(0), 8)
    last = llama.last_hidden(hidden, jnp.asarray(parts[-1][1]))
    spec = DecodeSpec(CONFIG, sampling, 10, (5, 9))
    out = jax.jit(continue_prompts, static_argnames="spec")(params, prefixes, last, keys, spec)
    expected = run(params, whole, lengths, sampling, repeats=2, stop_ids=(5, 9))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.full
def test_answers_of_a_group_differ_and_seeds_differ(params: llama.Params) -> None:
    tokens, lengths = ragged_prompts(2, 5)
    out = run(params, tokens, lengths, SamplingConfig(), repeats=4)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 8
    assert run(params, tokens, lengths, SamplingConfig(), repeats=4).tokens.tolist() == out.tokens.tolist()
    assert run(params, tokens, lengths, SamplingConfig(), repeats=4, seed=1).tokens.tolist() != out.tokens.tolist()


# --- text in, text out -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> lsp.Policy:
    return lsp.load_pretrained(stopping_dir(tmp_path_factory.mktemp("tiny")))


@pytest.mark.full
def test_prompt_forms_mean_the_same(policy: lsp.Policy) -> None:
    text = "What is 3 + 4?"
    message = [{"role": "user", "content": text}]
    forms = [text, message, policy.tokenizer.chat_ids(text)]
    out = lsp.generate(policy, forms, GREEDY, max_completion_length=8)
    assert len(out) == 3 and len(set(out)) == 1


@pytest.mark.full
def test_batch_size_changes_no_text(policy: lsp.Policy) -> None:
    prompts = [f"Add {number} and {number + 1}" for number in range(7)]
    whole = lsp.generate(policy, prompts, seed=3, max_completion_length=12)
    assert lsp.generate(policy, prompts, seed=3, max_completion_length=12, batch_size=2) == whole
    assert lsp.generate(policy, prompts, seed=4, max_completion_length=12) != whole
    assert lsp.generate(policy, [], seed=3) == []


@pytest.mark.full
def test_forced_length(policy: lsp.Policy) -> None:
    ids = policy.tokenizer.chat_ids("Go on")
    free = lsp.generate(policy, [ids] * 16, seed=0, max_completion_length=40)
    forced = lsp.generate(policy, [ids] * 16, seed=0, max_completion_length=40, stop_at_eos=False)
    assert sum(map(len, forced)) > sum(map(len, free))
    assert all(long.startswith(short) for short, long in zip(free, forced, strict=True))


@pytest.mark.parametrize(
    ("prompts", "options", "field"),
    [
        ([[]], {}, "prompts[0]"),
        ([[5, 296]], {}, "prompts[0]"),
        ([[5, -1]], {}, "prompts[0]"),
        ([[5] * 1000], {}, "prompts[0] length"),
        (["a"], {"sampling": SamplingConfig(temperature=-1.0)}, "sampling.temperature"),
        (["a"], {"sampling": SamplingConfig(top_p=0.0)}, "sampling.top_p"),
        (["a"], {"max_completion_length": 0}, "max_completion_length"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_names_its_field(policy: lsp.Policy, prompts: object, options: dict, field: str) -> None:
    with pytest.raises(InputError) as caught:
        lsp.generate(policy, prompts, **options)
    assert caught.value.field == field


# --- the demo model ----------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Hi",
    "Name three colours.",
    "Write one sentence about the sea, the wind and the old lighthouse at the end of the pier.",
    "What is 12 + 30?",
    "Translate 'good morning' into French.",
    "Why is the sky blue? Answer in a few words.",
    "Complete: The quick brown fox",
    *(f"What is {a} + {b}?" for a, b in ((3, 4), (7, 8), (100, 1), (9, 9), (55, 45))),
    "Who wrote Hamlet?",
    "What is the opposite of hot?",
    "List the days of the week.",
    "What is H2O?",
    "Say yes.",
    "How many legs has a spider?",
    "Give me a word that rhymes with cat.",
]


@pytest.mark.parametrize(
    ("number", "length"), [pytest.param(8, 16, marks=pytest.mark.full), pytest.param(20, 24, marks=pytest.mark.slow)]
)
def test_demo_model_in_one_batch_equals_transformers_one_by_one(demo_dir: Path, number: int, length: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    policy, questions = lsp.load_pretrained(demo_dir), QUESTIONS[:number]
    assert len(questions) == number
    ours = lsp.generate(policy, questions, GREEDY, max_completion_length=length)
    assert "Paris" in ours[0]
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32).eval()
    for question, text in zip(questions, ours, strict=True):
        ids = policy.tokenizer.chat_ids(question)
        with torch.no_grad():
            out = model.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False)[0, len(ids) :].tolist()
        assert text == policy.tokenizer.decode(out, skip_special_tokens=True)
