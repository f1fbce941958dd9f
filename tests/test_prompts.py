"""Joining, splicing and searching ids on device, against plain Python lists; templates cut from a chat template."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.text.prompts import (
    SLOT,
    PlayPrompts,
    PromptConfig,
    Ragged,
    TokenTemplate,
    contains_sequence,
    ids_row,
    pack,
    splice,
    template_pieces,
)
from lsp_jax.text.tokenizer import Tokenizer
from tiny import BOS, EOS, write_tokenizer

Lists = list[list[int]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_pretrained(directory)


def random_lists(rng: np.random.Generator, rows: int, width: int, vocabulary: int = 50) -> Lists:
    """Rows of 0 to `width` ids, with empty and full ones among them."""
    sizes = rng.integers(0, width + 1, rows)
    sizes[0], sizes[-1] = 0, width
    return [rng.integers(0, vocabulary, size).tolist() for size in sizes]


def ragged(lists: Lists, width: int, rng: np.random.Generator) -> Ragged:
    """Padded with random ids: nothing may read them."""
    rows = [[*row, *rng.integers(0, 50, width - len(row)).tolist()] for row in lists]
    tokens = jnp.asarray(rows, jnp.int32).reshape(len(lists), width)
    return tokens, jnp.asarray([len(row) for row in lists], jnp.int32)


def check(joined: Ragged, expected: Lists, width: int) -> None:
    tokens, lengths = joined
    assert tokens.dtype == jnp.int32 and lengths.dtype == jnp.int32
    assert tokens.shape == (len(expected), width)
    assert lengths.tolist() == [len(row) for row in expected]
    assert tokens.tolist() == [[*row, *[0] * (width - len(row))] for row in expected]


@pytest.mark.parametrize("seed", range(12))
def test_pack_joins_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, widths = int(rng.integers(2, 7)), rng.integers(1, 8, int(rng.integers(1, 5)))
    parts, lists = [], []
    for width in widths.tolist():
        shared = bool(rng.random() < 0.3) and len(parts) > 0
        part = random_lists(rng, 1 if shared else rows, width)
        parts.append(ragged(part, width, rng))
        lists.append(part * rows if shared else part)
    expected = [[token for part in lists for token in part[row]] for row in range(rows)]
    check(jax.jit(pack)(parts), expected, int(widths.sum()))


def test_pack_takes_parts_without_columns_and_one_shared_row() -> None:
    empty, fixed = ids_row(()), ids_row((5, 6))
    assert empty[0].shape == (1, 0)
    check(pack((fixed, empty)), [[5, 6]], 2)
    text = (jnp.asarray([[1, 2, 9], [3, 9, 9]]), jnp.asarray([2, 0]))
    check(pack((empty, text, empty, fixed)), [[1, 2, 5, 6], [5, 6]], 5)


def test_pack_keeps_stop_and_pad_ids_as_they_are() -> None:
    text = (jnp.asarray([[EOS, 0, EOS], [0, 0, EOS]]), jnp.asarray([3, 2]))
    check(pack((ids_row((0, EOS)), text)), [[0, EOS, EOS, 0, EOS], [0, EOS, 0, 0]], 5)


@pytest.mark.parametrize("seed", range(6))
def test_splice_puts_text_into_its_slot(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prefix, suffix = (tuple(rng.integers(0, 50, size).tolist()) for size in rng.integers(0, 5, 2))
    lists = random_lists(rng, 5, 6)
    expected = [[*prefix, *row, *suffix] for row in lists]
    spliced = splice(TokenTemplate(prefix, suffix), ragged(lists, 6, rng))
    check(spliced, expected, len(prefix) + 6 + len(suffix))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 9])
def test_contains_sequence_equals_a_search_in_lists(size: int) -> None:
    rng = np.random.default_rng(size)
    outcomes = []
    for _ in range(25):
        lists = [rng.integers(0, 2, rng.integers(0, 9)).tolist() for _ in range(8)]
        sequence = rng.integers(0, 2, size).tolist()
        width = 8
        tokens = np.asarray(ragged(lists, width, rng)[0]) % 2  # the padding would often complete a match
        lengths = jnp.asarray([len(row) for row in lists])
        expected = [any(row[i : i + size] == sequence for i in range(len(row) - size + 1)) for row in lists]
        assert contains_sequence((jnp.asarray(tokens), lengths), sequence).tolist() == expected
        outcomes += expected
    assert not all(outcomes) and (any(outcomes) or size > 5)


def test_contains_sequence_at_the_edges_of_a_row() -> None:
    text = (jnp.asarray([[1, 2, 3, 4], [1, 2, 3, 4], [3, 4, 1, 2], [1, 2, 3, 4]]), jnp.asarray([4, 3, 2, 0]))
    assert contains_sequence(text, [3, 4]).tolist() == [True, False, True, False]
    assert contains_sequence(text, [1, 2, 3, 4]).tolist() == [True, False, False, False]
    assert contains_sequence(text, [1, 2, 3, 4, 5]).tolist() == [False] * 4
    assert contains_sequence(text, []).tolist() == [False] * 4


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["What is 3 + 4?", "a", "\u00e9\u00e8 x\n\nline", " padded "])
def test_solver_template_gives_the_ids_of_the_chat_template(tokenizer: Tokenizer, query: str) -> None:
    prompts = PlayPrompts.build(tokenizer, PromptConfig())
    ids = tokenizer.encode(query)
    tokens, lengths = splice(prompts.solver, ids_row(ids))
    assert tokens[0, : int(lengths[0])].tolist() == tokenizer.chat_ids(query)
    assert tokens[0, 0] == BOS and tokens[0, 1] != BOS


def test_query_prefix_belongs_to_prompt_and_query(tokenizer: Tokenizer) -> None:
    config = PromptConfig(challenger="Write one question.", query_prefix="What is ")
    prompts = PlayPrompts.build(tokenizer, config)
    assert prompts.query_prefix_ids == tuple(tokenizer.encode("What is "))
    asked = tokenizer.chat_ids("Write one question.")
    assert prompts.challenger_ids == (*asked, *prompts.query_prefix_ids)
    assert PlayPrompts.build(tokenizer, config) == prompts and hash(prompts) == hash(prompts)


def test_pieces_around_two_slots_rebuild_the_conversation(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": f"Ask: {SLOT}"}, {"role": "assistant", "content": SLOT}]
    first, middle, last = template_pieces(tokenizer, messages)
    filled = [{"role": "user", "content": "Ask: Who?"}, {"role": "assistant", "content": "You."}]
    built = [*first, *tokenizer.encode("Who?"), *middle, *tokenizer.encode("You."), *last]
    assert built == tokenizer.chat_ids(filled)


def test_template_that_changes_its_text_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("message['content']", "message['content'] | upper"))
    with pytest.raises(ValueError, match="chat_template"):
        PlayPrompts.build(Tokenizer.from_pretrained(tmp_path), PromptConfig())
