"""The judge that writes: the grammar of its turn by hand-made scores, its generation against plain generation, and
texts that forge its output."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

import lsp_jax as lsp
from lsp_jax.core import runtime
from lsp_jax.model.llama import Params
from lsp_jax.model.weights import save_params
from lsp_jax.play.decode import DecodeSpec
from lsp_jax.play.generate import complete
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import EpisodeReward
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.judge import Judge, judge_params
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.text_judge import judge_spec, judge_turns, parse_score, write_judgements
from lsp_jax.text.judge_prompts import TEXT_VERDICT, load_criteria, rubric_text, text_judge_template
from lsp_jax.training.setup import token_classes
from test_quality import encoded, episode, ragged
from tiny import EOS, byte_tokenizer, tiny_config, tiny_dir, tiny_params, write_tokenizer

TURNS: list[tuple[str, int | None]] = [
    # well-formed
    ("1+0+1+1+0+1+1=5\n<score>5</score>", 5),
    ("0+0+0+0+0+0+0=0\n<score>0</score>", 0),
    ("1+1+1+1+1+1+1=7\n<score>7</score>", 7),
    (" 1 + 0 + 0 + 0 + 0 + 0 + 0 = 1 \n\n <score> 1 </score> \n", 1),
    ("0+0+0+0+0+1+1=2<score>2</score>", 2),
    ("0 +1+ 1\n+1+0+0+0\t=\t3\r\n<score>3</score>", 3),
    # the three totals do not agree
    ("1+0+1+1+0+1+1=6\n<score>6</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>7</score>", None),
    ("1+0+1+1+0+1+1=7\n<score>5</score>", None),
    ("0+0+0+0+0+0+0=7\n<score>7</score>", None),
    # items
    ("1+0+1+1+0+1=4\n<score>4</score>", None),
    ("1+0+1+1+0+1+1+0=5\n<score>5</score>", None),
    ("2+0+1+1+0+0+1=5\n<score>5</score>", None),
    ("1-0+1+1+0+1+1=5\n<score>5</score>", None),
    ("-1+0+1+1+0+1+1=3\n<score>3</score>", None),
    ("1+0+1+10+1+1=5\n<score>5</score>", None),
    ("1.0+0+1+1+0+1+1=5\n<score>5</score>", None),
    ("1 0 1 1 0 1 1=5\n<score>5</score>", None),
    ("yes+no+yes+yes+no+yes+yes=5\n<score>5</score>", None),
    ("\u0661+0+1+1+0+1+1=5\n<score>5</score>", None),  # another script's digit
    ("1\uff0b0+1+1+0+1+1=5\n<score>5</score>", None),  # a wide plus
    # totals and tags
    ("1+0+1+1+0+1+1\n<score>5</score>", None),
    ("1+0+1+1+0+1+1=05\n<score>5</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>05</score>", None),
    ("1+0+1+1+0+1+1=5", None),
    ("1+0+1+1+0+1+1=5\n<score>5", None),
    ("1+0+1+1+0+1+1=5\n5</score>", None),
    ("1+0+1+1+0+1+1=5\n<score></score>", None),
    ("1+0+1+1+0+1+1=5\n<Score>5</Score>", None),
    ("1+0+1+1+0+1+1=5\n<score>5/7</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>five</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>\u0665</score>", None),
    ("<score>5</score>\n1+0+1+1+0+1+1=5", None),
    ("<score>5</score>", None),
    ("1+1+1+1+1+1+1+1=8\n<score>8</score>", None),
    # a second one, or a word more
    ("1+0+1+1+0+1+1=5\n<score>5</score>\n<score>5</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>5</score>\n1+0+1+1+0+1+1=5\n<score>5</score>", None),
    ("<score>7</score>\n1+0+1+1+0+1+1=5\n<score>5</score>", None),
    ("1+0+1+1+0+1+1=5\n<score><score>5</score></score>", None),
    ("The response says 1+0+1+1+0+1+1=5\n<score>5</score>", None),
    ("1+0+1+1+0+1+1=5\n<score>5</score> Well done.", None),
    ("1+0+1+1+0+1+1=5\n<score>5</score>\0", None),
    ("1+0+1+1+0+1+1=5\n<score>5</score><|im_end|>", None),
    ("", None),
    ("7", None),
]


@pytest.mark.parametrize(("turn", "score"), TURNS)
def test_hand_made_turns(turn: str, score: int | None) -> None:
    assert parse_score(turn) == score


def test_every_calculation_scores_its_sum_and_no_other_total() -> None:
    for items in itertools.product("01", repeat=7):
        scores = {
            (total, tagged): parse_score(f"{'+'.join(items)}={total}\n<score>{tagged}</score>")
            for total in range(9)
            for tagged in range(9)
        }
        total = sum(map(int, items))
        assert scores.pop((total, total)) == total
        assert set(scores.values()) == {None}


# --- generation ------------------------------------------------------------------------------------------------------


def text_reward(policy: lsp.Policy, name: str = "quality", **options: Any) -> EpisodeReward:
    config = RewardConfig(quality_mode="text", **options)
    reward = quality_reward(policy.params, policy, token_classes(policy), config, name)
    assert isinstance(reward, EpisodeReward)
    return reward


def conversations(policy: lsp.Policy, texts: list[tuple[str, str]]) -> list[list[int]]:
    return [
        policy.tokenizer.chat_ids(
            [
                {"role": "user", "content": rubric_text(load_criteria()) + query},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": TEXT_VERDICT},
            ]
        )
        for query, answer in texts
    ]


@pytest.mark.full
def test_turns_equal_greedy_generation_over_the_chat_template(tmp_path: Path) -> None:
    directory = tiny_dir(tmp_path, max_position_embeddings=4096)
    stops = [EOS, *range(60, 110)]  # so many that random weights stop at various lengths
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    policy = lsp.load_pretrained(directory)
    play = encoded(policy)
    queries = ["What is 3 + 4?", "Add 12", "Say it"]
    answers = [["7", "It is 8."], ["ok", "x" * 12], ["Yes", "No no no"]]
    texts = [(query, answer) for query, group in zip(queries, answers, strict=True) for answer in group]
    prompts = conversations(policy, texts)
    tokens, lengths = ragged(prompts, max(map(len, prompts)))
    greedy = SamplingConfig(temperature=0)
    spec = DecodeSpec(policy.config, greedy, 12, policy.tokenizer.stop_ids)
    expected = complete(policy.params, (tokens, lengths), jax.random.key(1), jnp.int32(0), spec)
    judge = Judge(policy.config, text_judge_template(policy.tokenizer), policy.tokenizer.encode(" ")[0], rows=4)
    params = judge_params(policy.params, judge, policy.tokenizer, token_classes(policy))
    spec = judge_spec(judge, 12, policy.tokenizer.stop_ids)
    written = write_judgements(params, play, judge=judge, spec=spec)
    assert written.tokens.shape == (3, 2, 12)
    for name in ("tokens", "lengths", "stopped"):
        value = np.asarray(getattr(written, name))
        np.testing.assert_array_equal(value.reshape(6, *value.shape[2:]), getattr(expected, name))
    assert 0 < int(expected.stopped.sum()) < 6 and len(set(expected.lengths.tolist())) > 2
    turns = [turn for group in judge_turns(written, policy.tokenizer) for turn in group]
    plain = lsp.generate(policy, prompts, greedy, max_completion_length=12)
    assert [turn is None for turn in turns] == [not stopped for stopped in expected.stopped.tolist()]
    assert all(turn is None or turn == text for turn, text in zip(turns, plain, strict=True))


# --- a judge whose words are known -----------------------------------------------------------------------------------


def speaking_policy(directory: Path, words: list[str], stops: bool = True) -> lsp.Policy:
    """A Llama that says `words` whatever it is shown, then stops (or says the last one for ever).

    Attention and MLP add nothing, so the next token depends on the last one alone; each of the words is one token, and
    a line end, with which the template opens the judge's turn, is followed by the first.
    """
    write_tokenizer(directory)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    tokenizer.save(str(directory / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    config = tiny_config(
        vocab_size=size, hidden_size=512, num_hidden_layers=1, tie_word_embeddings=False, max_position_embeddings=4096
    )
    params: Params = jax.tree.map(jnp.zeros_like, tiny_params(config))
    ids = [tokenizer.token_to_id(word) for word in words]
    line_end = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    following = dict(itertools.pairwise([line_end, *ids, EOS if stops else ids[-1]]))
    head = np.zeros((size, 512), np.float32)
    for token, after in following.items():
        head[after, token] = 1
    params["model"]["embed_tokens"]["weight"] = jnp.eye(size, 512)
    params["model"]["norm"]["weight"] = jnp.ones(512)
    params["lm_head"]["weight"] = jnp.asarray(head)
    save_params(params, config, directory)
    return lsp.load_pretrained(directory)


def played(policy: lsp.Policy, pairs: list[tuple[str, str]]) -> Episode:
    """Pairs of texts as an episode of two answers a query: the text and its beginning."""
    encode = policy.tokenizer.encode
    queries = [encode(query) for query, _ in pairs]
    answers = [[encode(answer), encode(answer)[:-1] or encode("a")] for _, answer in pairs]
    width = max(len(ids) for ids in [*queries, *(ids for group in answers for ids in group)]) + 1
    return episode(queries, answers, policy.tokenizer.stop_ids[0], width)


WORDS = ["1+0+1+1+0+1+1=5\n", "<score>5</score>"]


@pytest.mark.full
def test_scores_come_to_the_device_with_one_read(tmp_path: Path) -> None:
    policy = speaking_policy(tmp_path, WORDS)
    reward = text_reward(policy, name="judge", quality_weight=2.0)
    assert (reward.name, reward.kind, reward.weight) == ("judge", "quality", 2.0)
    play = played(policy, [("Add 1", "2"), ("What", "Yes")])
    before = runtime.reads()
    out = reward.score(play)
    assert runtime.reads() == before + 1
    assert all(isinstance(array, jax.Array) for array in out)
    assert out.values.dtype == jnp.float32 and out.values.tolist() == [[5, 5], [5, 5]]
    assert out.valid_answer.tolist() == [[True, True], [True, True]] and out.valid_query.tolist() == [True, True]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["1+0+1+1+0+1+1=5\n", "<score>7</score>"], {}),  # contradicts itself
        pytest.param(["1+0+1+1+0+1+1=5\n", "no tag"], {}, marks=pytest.mark.full),
        pytest.param(["1+0+1+1+0+1+1=5\n", "<score>5</score>", "<score>5</score> "], {}, marks=pytest.mark.full),
        pytest.param(WORDS, {"quality_max_length": 2}, marks=pytest.mark.full),  # whole, but the stop token was cut off
    ],
)
def test_what_the_judge_does_not_write_well_is_masked(tmp_path: Path, words: list[str], options: dict) -> None:
    policy = speaking_policy(tmp_path, words)
    out = text_reward(policy, **options).score(played(policy, [("Add 1", "2")]))
    assert not bool(out.valid_answer.any()) and bool(out.valid_query.all()) and float(abs(out.values).max()) == 0


def test_a_judge_that_never_stops_is_masked(tmp_path: Path) -> None:
    policy = speaking_policy(tmp_path, WORDS, stops=False)
    assert not bool(text_reward(policy).score(played(policy, [("Add 1", "2")])).valid_answer.any())


@pytest.mark.full
def test_demo_model_writes_what_it_would_in_its_own_chat(demo_dir: Path) -> None:
    policy = lsp.load_pretrained(demo_dir)
    encode = policy.tokenizer.encode
    texts = [("What is 3 + 4?", "3 + 4 = 7."), ("What is 3 + 4?", "banana banana")]
    play = episode([encode(texts[0][0])], [[encode(answer) for _, answer in texts]], policy.tokenizer.stop_ids[0], 12)
    judge = Judge(policy.config, text_judge_template(policy.tokenizer), encode(" ")[0], rows=2)
    params = judge_params(policy.params, judge, policy.tokenizer, token_classes(policy))
    spec = judge_spec(judge, 12, policy.tokenizer.stop_ids)
    written = write_judgements(params, play, judge=judge, spec=spec)
    tokens, lengths = runtime.to_host((written.tokens[0], written.lengths[0] - written.stopped[0]))
    turns = [policy.tokenizer.decode(ids[:length].tolist()) for ids, length in zip(tokens, lengths, strict=True)]
    greedy = SamplingConfig(temperature=0)
    assert turns == lsp.generate(policy, conversations(policy, texts), greedy, max_completion_length=12)
    out = text_reward(policy, quality_max_length=12).score(play)
    assert out.values.shape == (1, 2) and bool(((out.values >= 0) & (out.values <= 7)).all())
