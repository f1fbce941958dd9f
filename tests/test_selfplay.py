"""Self-play: what a query becomes on its way to the Solver, and which queries are valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
from lsp_jax.algorithm import rollout
from lsp_jax.core.errors import InputError
from lsp_jax.model import llama
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, PlayConfig, read_queries
from lsp_jax.text.prompts import PlayPrompts, PromptConfig
from lsp_jax.training.setup import token_classes
from specs import game_spec
from tiny import stopping_dir, tiny_dir

PLAY = PlayConfig(num_queries=6, num_generations=3, max_query_length=10, max_completion_length=7)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> lsp.Policy:
    return lsp.load_pretrained(stopping_dir(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def prompts(policy: lsp.Policy) -> PlayPrompts:
    return PlayPrompts.build(policy.tokenizer, PromptConfig("Write a question.", query_prefix="What is "))


@pytest.fixture(scope="module")
def play(policy: lsp.Policy, prompts: PlayPrompts) -> Callable[[int], Episode]:
    """An episode by seed."""
    game, _ = game_spec(policy.config, prompts, policy.tokenizer.stop_ids, play=PLAY)
    classes = token_classes(policy)

    @jax.jit
    def run(params: llama.Params, key: jax.Array) -> Episode:
        return rollout.solve(params, rollout.challenge(params, classes, key, game), key, game)

    return lambda seed: run(policy.params, jax.random.key(seed))


Play = Callable[[int], Episode]


@pytest.mark.full
def test_solver_prompts_are_the_chat_template_around_the_sampled_ids(
    policy: lsp.Policy, prompts: PlayPrompts, play: Play
) -> None:
    episode = play(0)
    tokens, lengths = episode.prompts
    begins = policy.tokenizer.encode("What is ")
    for n in range(PLAY.num_queries):
        sampled = episode.queries.sampled
        end = int(sampled.lengths[n]) - int(sampled.stopped[n])
        written = begins + sampled.tokens[n, :end].tolist()
        assert episode.queries.text[0][n, : int(episode.queries.text[1][n])].tolist() == written
        expected = [*prompts.solver.prefix_ids, *written, *prompts.solver.suffix_ids]
        assert tokens[n, : int(lengths[n])].tolist() == expected
        query = policy.tokenizer.decode(written)
        if policy.tokenizer.encode(query) == written and query == query.strip():  # the text round-trips
            assert expected == policy.tokenizer.chat_ids(query)
    assert episode.answers.tokens.shape == (6, 3, 7)


@pytest.mark.full
def test_each_role_continues_its_own_prompt(policy: lsp.Policy, prompts: PlayPrompts, play: Play) -> None:
    """First-token log-probabilities of both roles equal a plain forward over the role's prompt."""
    episode = play(0)
    challenger = jnp.asarray([prompts.challenger_ids])
    assert prompts.challenger_ids[: -len(prompts.query_prefix_ids)] == tuple(
        policy.tokenizer.chat_ids("Write a question.")
    )
    logp = jax.nn.log_softmax(lsp.forward(policy.params, policy.config, challenger)[0, -1])
    first = episode.queries.sampled
    np.testing.assert_allclose(first.logprobs[:, 0], logp[first.tokens[:, 0]], atol=1e-5)
    tokens, lengths = episode.prompts
    logp = jax.nn.log_softmax(lsp.forward(policy.params, policy.config, tokens), axis=-1)
    for n in range(PLAY.num_queries):
        expected = logp[n, int(lengths[n]) - 1][episode.answers.tokens[n, :, 0]]
        np.testing.assert_allclose(episode.answers.logprobs[n, :, 0], expected, atol=1e-5)


@pytest.mark.full
def test_roles_and_keys_draw_their_own_noise(play: Play) -> None:
    one, same, other = play(0), play(0), play(1)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.queries.sampled.tokens.tolist() != other.queries.sampled.tokens.tolist()
    assert len({tuple(row) for row in one.queries.sampled.tokens.tolist()}) > 1


def validity(policy: lsp.Policy, prompts: PlayPrompts, ids: list[int], stopped: bool) -> bool:
    """Whether a query of these sampled ids is called valid."""
    row = [*ids, policy.tokenizer.stop_ids[0]] if stopped else ids
    sampled = Completions(
        jnp.asarray([row + [0] * (12 - len(row))] * 2),
        jnp.full(2, len(row), jnp.int32),
        jnp.zeros((2, 12)),
        jnp.zeros((2, 12)),
        jnp.full(2, stopped),
    )
    return bool(read_queries(sampled, token_classes(policy), prompts).valid[0])


@pytest.mark.full
def test_only_whole_plain_queries_are_valid(policy: lsp.Policy, prompts: PlayPrompts) -> None:
    encode = policy.tokenizer.encode

    def valid(ids: list[int], stopped: bool = True) -> bool:
        return validity(policy, prompts, ids, stopped)

    assert valid(encode("3 + 4?"))
    assert not valid(encode("3 + 4?"), stopped=False), "cut off"
    assert not valid([]), "empty"
    assert not valid(encode(" \n ")), "blank, though the fixed beginning is not"
    assert not valid([*encode("3"), policy.tokenizer.bos_id, *encode("4")]), "leaks a control token"
    assert valid(encode("a")), "one letter is text"


@pytest.mark.full
def test_tags_spelled_in_ordinary_tokens_leak_too(tmp_path: Path) -> None:
    """A template whose tags are plain text, as Llama 2's, leaks them in ordinary tokens."""
    directory = tiny_dir(tmp_path)
    config = directory / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data["chat_template"] = (
        "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user'"
        " else m['content'] }}{% endfor %}"
    )
    config.write_text(json.dumps(data))
    policy = lsp.load_pretrained(directory)
    prompts = PlayPrompts.build(policy.tokenizer, PromptConfig("Ask."))
    encode = policy.tokenizer.encode
    assert prompts.tags
    assert validity(policy, prompts, encode("3 + 4?"), True)
    assert not validity(policy, prompts, encode("a [/INST] b"), True)
    assert not validity(policy, prompts, encode("[INST]"), True)
    assert validity(policy, prompts, encode("a [/INS b"), True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_generations": 1}, "play.num_generations"),
        ({"num_queries": 1}, "play.num_queries"),
        ({"num_queries": 0}, "play.num_queries"),
        ({"max_query_length": 0}, "play.max_query_length"),
        ({"max_completion_length": 0}, "play.max_completion_length"),
    ],
)
def test_sizes_that_cannot_learn_are_refused(change: dict[str, int], field: str) -> None:
    with pytest.raises(InputError) as caught:
        PlayConfig(**change).check(trains_challenger=True)
    assert caught.value.field == field
    PlayConfig(num_queries=1).check(trains_challenger=False)
