"""Judge prompts of the quality self-reward: seven criteria from a file, a query and its answer.

The prompt is a conversation: the criteria and the query, the answer in its own turn, the request to judge it. In
`logits` mode the judge's turn is prefilled once per criterion ("3.") and the score is read from the logits of yes and
no. In `text` mode the judge writes its calculation and a tagged score, which `reward/text_judge.py` parses.

The wording is ours; the paper's rubric is not copied. LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.text.prompts import SLOT, Message, template_pieces, text_tags
from lsp_jax.text.tokenizer import Tokenizer

Mode = Literal["logits", "text"]

CRITERIA = 7
RUBRIC_FILE = Path(__file__).with_name("rubric.toml")

_RUBRIC = """\
Below are an instruction and then the response that an assistant gave to it. Judge the response by seven criteria, \
each with yes or no:
{criteria}

Instruction:
"""

VERDICT = "Judge the response above by the seven criteria. Write each number with yes or no."

TEXT_VERDICT = """\
Judge the response above by the seven criteria. Write seven digits joined by +, 1 for a criterion that is met and 0 \
for one that is not, then = and their total. On the next line write the total between <score> and </score>. Write \
nothing else."""


@dataclass(frozen=True)
class JudgeTemplate:
    """The judge's prompt as token ids: rubric, query, middle, answer, tail. Hashable."""

    rubric_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    """From the end of the answer to the start of the judge's turn."""

    @property
    def fixed_length(self) -> int:
        """Number of prompt tokens other than query and answer."""
        return len(self.rubric_ids + self.middle_ids + self.tail_ids)


@dataclass(frozen=True)
class LogitsTemplate(JudgeTemplate):
    """A judge prompt with one short branch per criterion, each following the tail."""

    branch_ids: tuple[tuple[int, ...], ...]
    """CRITERIA tuples: the start of the judge's turn, up to the yes or no."""
    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]

    @property
    def fixed_length(self) -> int:
        """Number of prompt tokens other than query and answer, the longest branch included."""
        return super().fixed_length + max(map(len, self.branch_ids))


def check_mode(mode: str) -> None:
    """Raises InputError for an unknown mode."""
    if mode not in get_args(Mode):
        raise InputError("mode", mode, f"must be one of {', '.join(get_args(Mode))}")


def load_criteria(path: str | Path = "") -> tuple[str, ...]:
    """Reads the seven criteria of the rubric file `path`; empty: the rubric of the package.

    Raises InputError when the file is missing, is not TOML, or does not hold seven strings in `criteria`.
    """
    file = user_path("rubric", path) if path else RUBRIC_FILE
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError("rubric", str(path), f"cannot be read ({error.strerror}); give a TOML file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested too deeply
        raise InputError("rubric", str(path), f"is not TOML in UTF-8 ({error}); see text/rubric.toml") from error
    criteria = content.get("criteria")
    if set(content) != {"criteria"} or not isinstance(criteria, list) or len(criteria) != CRITERIA:
        found = len(criteria) if isinstance(criteria, list) else ", ".join(content) or "nothing"
        raise InputError(
            "rubric", str(path), f"must hold only `criteria`, a list of {CRITERIA} strings (found {found})"
        )
    for number, criterion in enumerate(criteria, 1):
        if not isinstance(criterion, str) or not criterion.strip() or SLOT in criterion:
            raise InputError("rubric", str(path), f"criterion {number} must be a non-empty string")
    return tuple(criterion.strip() for criterion in criteria)


def rubric_text(criteria: Sequence[str]) -> str:
    """Returns the text before the query in the judge's first message."""
    numbered = "\n".join(f"{number}. {criterion}" for number, criterion in enumerate(criteria, 1))
    return _RUBRIC.format(criteria=numbered)


def judge_messages(criteria: Sequence[str], mode: Mode, query: str, answer: str) -> list[Message]:
    """Returns the conversation shown to the judge.

    Query and answer each end at a tag of the chat template, so that no token can span both model text and template.
    """
    return [
        {"role": "user", "content": rubric_text(criteria) + query},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": VERDICT if mode == "logits" else TEXT_VERDICT},
    ]


def _pieces(tokenizer: Tokenizer, criteria: Sequence[str], mode: Mode) -> tuple[tuple[int, ...], ...]:
    """Returns the fixed token ids around query and answer."""
    rubric = rubric_text(criteria)
    if not tokenizer.special_ids.isdisjoint(tokenizer.encode(rubric, allow_special=True)):
        raise InputError("rubric", rubric, "contains a control token of the model's tokenizer; reword it")
    return template_pieces(tokenizer, judge_messages(criteria, mode, SLOT, SLOT))


def judge_template(tokenizer: Tokenizer, criteria: Sequence[str] | None = None) -> LogitsTemplate:
    """Builds the judge prompt of `logits` mode; without `criteria`, from those of the package.

    Raises InputError when the chat template is missing or changes text, and when yes or no is not a single token.
    """
    pieces = _pieces(tokenizer, criteria or load_criteria(), "logits")
    words = {answer: [answer, answer.capitalize(), " " + answer, " " + answer.capitalize()] for answer in ("yes", "no")}
    ids = {
        answer: sorted({tokenizer.encode(form)[0] for form in forms if len(tokenizer.encode(form)) == 1})
        for answer, forms in words.items()
    }
    if not ids["yes"] or not ids["no"]:
        raise InputError("tokenizer", "yes / no", "the judge needs a vocabulary with single tokens for yes and no")
    branches = tuple(tuple(tokenizer.encode(f"{number}.")) for number in range(1, CRITERIA + 1))
    return LogitsTemplate(*pieces, branch_ids=branches, yes_ids=tuple(ids["yes"]), no_ids=tuple(ids["no"]))


def text_judge_template(tokenizer: Tokenizer, criteria: Sequence[str] | None = None) -> JudgeTemplate:
    """Builds the judge prompt of `text` mode; without `criteria`, from those of the package.

    Raises InputError when the chat template is missing or changes text.
    """
    return JudgeTemplate(*_pieces(tokenizer, criteria or load_criteria(), "text"))


def judge_length(tokenizer: Tokenizer, mode: Mode = "logits", rubric: str | Path = "", max_length: int = 64) -> int:
    """Number of tokens of judging other than query and answer, including the judge's completion in `text` mode."""
    check_mode(mode)
    criteria = load_criteria(rubric)
    if mode == "logits":
        return judge_template(tokenizer, criteria).fixed_length
    return text_judge_template(tokenizer, criteria).fixed_length + max_length


def judge_tags(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the chat template's tags that are made of ordinary tokens, such as Llama 2's `[/INST]`."""
    roles = ("user", "assistant", "user")
    return text_tags(tokenizer, template_pieces(tokenizer, [{"role": role, "content": SLOT} for role in roles]))
