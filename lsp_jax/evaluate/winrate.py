"""Win rates in AlpacaEval's formats: every instruction is judged in both orders, and verdicts are cached by content.

Input: a JSON list (or JSONL) of objects with `instruction`, optionally `dataset` (the subset), and for existing outputs
`output` and `generator`. Output: the same with the model's `output`, and annotations for `alpaca_eval` with `output_1`
(the baseline's), `output_2` (the model's) and `preference` from 1 (baseline) to 2 (model), 1.5 for a tie.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_jsonl_lines, user_path
from lsp_jax.evaluate.judges import FAILED, FIRST, MALFORMED, SECOND, TIE, Judge, Pair, Verdict
from lsp_jax.evaluate.result_cache import Store, digest
from lsp_jax.evaluate.statistics import WinRate, win_rate

TIES = "a tie counts half in the win rate, and not at all in wins only"
_FOR_FIRST = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}


class Instruction(NamedTuple):
    """An instruction in AlpacaEval's format."""

    text: str
    subset: str
    output: str | None = None
    """Output in the file, if any."""
    generator: str = ""


def load_instructions(file: str, field: str, outputs: bool = False) -> list[Instruction]:
    """Reads a JSON list or JSONL file; with `outputs`, all entries must have one. Raises InputError naming `field`."""
    found = []
    for place, row in _instruction_rows(file, field):
        needed = ("instruction", "output") if outputs else ("instruction",)
        for name in needed:
            if (
                not isinstance(row, dict)
                or not isinstance(row.get(name), str)
                or (name != "output" and not row[name].strip())
            ):
                raise InputError(field, place, f"has no text in {name!r} (AlpacaEval's format)")
        found.append(
            Instruction(
                row["instruction"], str(row.get("dataset", "")), row.get("output"), str(row.get("generator", ""))
            )
        )
    if not found:
        raise InputError(field, file, "holds no instructions")
    return found


def _instruction_rows(file: str, field: str) -> list[tuple[str, Any]]:
    """The entries of a file, each with its place."""
    path = user_path(field, file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            return list(read_jsonl_lines(path, field))
        return [(f"{path}, entry {number}", row) for number, row in enumerate(json.loads(text), 1)]
    except OSError as error:
        raise InputError(field, file, f"cannot be read ({error.strerror}); give AlpacaEval's JSON") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(field, file, f"is neither a JSON list nor JSON Lines in UTF-8 ({error})") from error


class Compared(NamedTuple):
    """An instruction with both outputs and the verdicts on them."""

    instruction: Instruction
    baseline: str
    model: str
    model_second: Verdict
    """Verdict with the baseline's output shown first."""
    model_first: Verdict
    """Verdict with the model's output shown first."""

    @property
    def score(self) -> float | None:
        """Score of the model, mean over both orders; None if a verdict is missing."""
        second, first = _FOR_FIRST.get(self.model_second.choice), _FOR_FIRST.get(self.model_first.choice)
        return None if second is None or first is None else (1.0 - second + first) / 2


def compare(
    instructions: Sequence[Instruction], baseline: Sequence[str], model: Sequence[str], judge: Judge, store: Store
) -> list[Compared]:
    """Has each instruction's outputs judged in both orders; verdicts in `store` are reused.

    A missing reply is not cached, so that a rerun requests it again; a malformed one is, because it would be repeated.
    """
    pairs = [Pair(i.text, b, m) for i, b, m in zip(instructions, baseline, model, strict=True)]
    both = [shown for pair in pairs for shown in (pair, pair.swapped)]
    keys = [digest("verdict", judge.identity, *pair) for pair in both]
    failed = _ask({key: pair for key, pair in zip(keys, both, strict=True) if key not in store}, judge, store)
    verdicts = [failed[key] if key in failed else Verdict(*store[key]) for key in keys]
    rows = zip(instructions, baseline, model, verdicts[::2], verdicts[1::2], strict=True)
    return [Compared(*row) for row in rows]


def missing(
    instructions: Sequence[Instruction], baseline: Sequence[str], model: Sequence[str], judge: Judge, store: Store
) -> list[Pair]:
    """Returns the pairs that `compare` would send to the judge."""
    pairs = [Pair(i.text, b, m) for i, b, m in zip(instructions, baseline, model, strict=True)]
    both = dict.fromkeys(shown for pair in pairs for shown in (pair, pair.swapped))
    return [pair for pair in both if digest("verdict", judge.identity, *pair) not in store]


def _ask(missing: Mapping[str, Pair], judge: Judge, store: Store) -> dict[str, Verdict]:
    """Adds the judge's verdicts to the store; returns the failed ones, by key."""
    keys, failed = list(missing), {}
    with tqdm(total=len(keys), desc="verdicts", disable=None) as progress:
        for index, verdict in judge.verdicts(list(missing.values())):
            if verdict.choice == FAILED:
                failed[keys[index]] = verdict
            else:
                store.add({keys[index]: list(verdict)})
            progress.update()
    return failed


class PositionBias(NamedTuple):
    """Position bias of a judge."""

    first: float
    """Fraction of decisive verdicts for the answer shown first; a half without bias."""
    consistent: float
    """Fraction of instructions whose two verdicts name the same winner, or are both ties."""


def position_bias(compared: Sequence[Compared]) -> PositionBias:
    """Returns the position bias over the instructions with both verdicts; NaN if there are none."""
    whole = [c for c in compared if c.score is not None]
    choices = Counter(v.choice for c in whole for v in (c.model_second, c.model_first))
    decided = choices[FIRST] + choices[SECOND]
    other = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}
    agreeing = sum(other[c.model_first.choice] == c.model_second.choice for c in whole)
    first = choices[FIRST] / decided if decided else float("nan")
    return PositionBias(first, agreeing / len(whole) if whole else float("nan"))


class Outcome(NamedTuple):
    """Results of a comparison."""

    overall: WinRate
    subsets: dict[str, WinRate]
    bias: PositionBias
    malformed: int
    """Number of replies without a verdict."""
    failed: int
    """Number of requests without a reply."""
    left_out: int
    """Number of instructions without both verdicts, which no rate includes."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the values for a result file."""
        bias = {name: None if value != value else round(value, 4) for name, value in self.bias._asdict().items()}
        subsets = {name: rate.as_dict() for name, rate in self.subsets.items()}
        counts = {"malformed": self.malformed, "failed": self.failed, "left_out": self.left_out}
        return {**self.overall.as_dict(), "subsets": subsets, "position_bias": bias, **counts, "ties_count": TIES}


def outcome(compared: Sequence[Compared]) -> Outcome:
    """Returns win rates overall and for each subset."""
    whole = [c for c in compared if c.score is not None]
    choices = Counter(v.choice for c in compared for v in (c.model_second, c.model_first))
    names = sorted({c.instruction.subset for c in whole} - {""})
    subsets = {name: _rate([c for c in whole if c.instruction.subset == name]) for name in names}
    counts = choices[MALFORMED], choices[FAILED], len(compared) - len(whole)
    return Outcome(_rate(whole), subsets, position_bias(whole), *counts)


def _rate(compared: Sequence[Compared]) -> WinRate:
    return win_rate([c.score or 0.0 for c in compared], [len(c.model) - len(c.baseline) for c in compared])


def outputs_json(instructions: Sequence[Instruction], texts: Sequence[str], generator: str) -> str:
    """Returns a model's outputs in the format of `alpaca_eval --model_outputs`."""
    rows = [
        {"dataset": i.subset, "instruction": i.text, "output": text, "generator": generator}
        for i, text in zip(instructions, texts, strict=True)
    ]
    return json.dumps(rows, indent=1) + "\n"


def annotations_json(compared: Sequence[Compared], baseline: str, model: str, judge: str) -> str:
    """Returns the annotations in `alpaca_eval`'s format; `preference` is null if a verdict is missing."""
    rows = [
        {
            "dataset": c.instruction.subset,
            "instruction": c.instruction.text,
            "output_1": c.baseline,
            "generator_1": baseline,
            "output_2": c.model,
            "generator_2": model,
            "annotator": judge,
            "preference": None if c.score is None else 1.0 + c.score,
            "verdict_model_second": c.model_second.choice,
            "verdict_model_first": c.model_first.choice,
        }
        for c in compared
    ]
    return json.dumps(rows, indent=1) + "\n"
