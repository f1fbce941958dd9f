"""`lsp-jax evaluate`: models and checkpoints on benchmarks, and their win rates against another model.

1. All inputs are checked first: options, files, sandboxes, the judge's key and URL.
2. Each subject generates all its answers, batched by length and cached by content.
3. Answers are graded, pairs judged in both orders, and result files written.

A rerun computes only missing results, so it continues a killed evaluation, and adding a checkpoint costs only that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lsp_jax.checkpoint.provenance import parameters_digest, versions
from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path, write_text
from lsp_jax.core.runtime import keep_programs
from lsp_jax.evaluate import tasks
from lsp_jax.evaluate.config import EvaluateConfig
from lsp_jax.evaluate.endpoint import Endpoint
from lsp_jax.evaluate.generation import Answer, Request, answers, chat_prompts
from lsp_jax.evaluate.judges import Judge, ModelJudge, RewardModelJudge, TextJudge, question
from lsp_jax.evaluate.models import Subject, open_subjects
from lsp_jax.evaluate.result_cache import Store
from lsp_jax.evaluate.tables import results_table
from lsp_jax.evaluate.winrate import (
    Compared,
    Instruction,
    annotations_json,
    compare,
    load_instructions,
    missing,
    outcome,
    outputs_json,
)
from lsp_jax.model.sharding import make_mesh
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.policy import Policy, load_pretrained
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.preference import load_reward_model

WINRATE_MAX_NEW_TOKENS = 1024
"""Default maximum length of an answer to an instruction, in tokens."""


class Asked(NamedTuple):
    """Problems and instructions, the same for every model."""

    problems: dict[str, list[tasks.Problem]]
    """Problems of each task."""
    instructions: list[Instruction]
    """Instructions of the win rate."""
    config: EvaluateConfig

    def of_tasks(self, policy: Policy) -> list[Request]:
        """Returns the requests for all tasks, in order; InputError if one does not fit the model."""
        config, wanted = self.config, []
        for name, problems in self.problems.items():
            max_new_tokens = config.max_completion_length or tasks.TASKS[name].max_new_tokens
            for ids in chat_prompts(policy, [problem.prompt for problem in problems], max_new_tokens):
                wanted += [self._request(ids, max_new_tokens, n, config.seed) for n in range(config.num_samples)]
        return wanted

    def of_winrate(self, policy: Policy, seed: int) -> list[Request]:
        """Returns a request for each instruction; InputError if one does not fit the model."""
        max_new_tokens = self.config.max_completion_length or WINRATE_MAX_NEW_TOKENS
        prompts = chat_prompts(policy, [instruction.text for instruction in self.instructions], max_new_tokens)
        return [self._request(prompt, max_new_tokens, 0, seed) for prompt in prompts]

    def _request(self, ids: tuple[int, ...], max_new_tokens: int, sample: int, seed: int) -> Request:
        return Request(ids, max_new_tokens, SamplingConfig(self.config.temperature), sample, seed)


class Baseline(NamedTuple):
    """The baseline of the win rate."""

    subject: Subject | None
    """The model; None for a file of outputs."""
    label: str
    outputs: list[str]
    """Outputs from the file; empty for a model."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs the evaluation, writes it to `output_dir` and returns the contents of `results.json`.

    Raises InputError for invalid input, before anything is generated, and RunError if a judge no longer replies (its
    earlier verdicts are cached).
    """
    arguments.instance("config", config, EvaluateConfig, "must be an EvaluateConfig").check()
    config = arguments.plain(config)
    asked, baseline = _asked(config)
    subjects = open_subjects(config.models, config.steps)
    for subject in subjects:  # checks lengths before any weights are read
        asked.of_tasks(subject.opened)
    for subject in (*subjects, *([baseline.subject] if baseline and baseline.subject else [])):
        asked.of_winrate(subject.opened, config.seed)
    with Workers() as workers, _judge_endpoint(config) as endpoint:
        tasks.check_grading(asked.problems, workers)
        for name, problems in asked.problems.items():
            tasks.check_golds(name, problems, workers)
        directory = user_path("output_dir", config.output_dir)
        mesh = make_mesh(config.mesh, subjects[0].opened.config)
        keep_programs(config.compilation_cache)
        with Store(directory / "answers.jsonl") as store, Store(directory / "verdicts.jsonl") as verdicts:
            entries, texts = [], []
            for subject in subjects:
                entry, written = _answered(subject, asked, store, workers, mesh)
                entries.append(entry)
                texts.append(written)
            results = {"versions": versions(), "models": entries}
            if baseline is not None:
                against = _WinRates(asked, baseline, _baseline_texts(baseline, asked, store, mesh), directory)
                judge = (
                    TextJudge(endpoint.name, endpoint.identity, endpoint.ask)
                    if endpoint
                    else _local(config, store, mesh)
                )
                results["winrate"] = against.judged(subjects, texts, judge, verdicts, endpoint)
    write_text(directory / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(directory / "results.md", results_table(results))
    return results


def _asked(config: EvaluateConfig) -> tuple[Asked, Baseline | None]:
    """Reads tasks, instructions and the baseline; InputError for invalid files."""
    named = tasks.named(config.tasks)
    problems = {name: tasks.load_task(name, file, config.limit) for name, file in named.items()}
    if not config.winrate_against:
        return Asked(problems, [], config), None
    if config.baseline_is_file:
        given = load_instructions(config.winrate_against, "winrate_against", outputs=True)
        instructions = load_instructions(config.instructions, "instructions") if config.instructions else given
        instructions = instructions[: config.limit or None]
        outputs = {row.text: row.output or "" for row in given}
        lacking = [row.text for row in instructions if row.text not in outputs]
        if lacking:
            remedy = f"has no output for {len(lacking)} of the instructions, such as {lacking[0][:60]!r}"
            raise InputError("winrate_against", config.winrate_against, remedy)
        label = given[0].generator or Path(config.winrate_against).name
        baseline = Baseline(None, label, [outputs[row.text] for row in instructions])
    else:
        instructions = load_instructions(config.instructions, "instructions")[: config.limit or None]
        (subject,) = open_subjects([config.winrate_against])
        baseline = Baseline(subject, subject.label, [])
    return Asked(problems, instructions, config), baseline


@contextmanager
def _judge_endpoint(config: EvaluateConfig) -> Iterator[Endpoint | None]:
    """Context with the judge's endpoint, checked to be reachable; None for a local judge."""
    if not config.winrate_against or config.judge.kind != "endpoint":
        yield None
        return
    endpoint = Endpoint(config.judge.endpoint, "judge.endpoint")
    try:
        endpoint.check()
        yield endpoint
    finally:
        endpoint.close()


def _local(config: EvaluateConfig, store: Store, mesh: Mesh | None) -> Judge:
    """Loads a local judge."""
    judge = config.judge
    if judge.kind == "reward_model":
        model = load_reward_model(judge.source, "auto", mesh=mesh)
        return RewardModelJudge(model, parameters_digest(model.params))
    policy = load_pretrained(judge.source, config.dtype, mesh=mesh)
    return ModelJudge(policy, parameters_digest(policy.params), store, judge.max_tokens)


def _answered(
    subject: Subject, asked: Asked, store: Store, workers: Workers, mesh: Mesh | None
) -> tuple[dict[str, Any], list[str]]:
    """Returns a subject's entry of the results, with graded tasks, and its answers to the instructions."""
    config = asked.config
    policy = subject.load(config.dtype, mesh)
    weights = parameters_digest(policy.params)
    of_tasks, of_winrate = asked.of_tasks(policy), asked.of_winrate(policy, config.seed)
    made = answers(policy, [*of_tasks, *of_winrate], store, weights, config.batch_size, subject.label)
    del policy  # grading needs no device
    entry = {"name": subject.name, "step": subject.step, "weights": weights, "tasks": {}}
    start = 0
    for name, problems in asked.problems.items():
        part = made[start : start + len(problems) * config.num_samples]
        start += len(part)
        entry["tasks"][name] = _graded(name, problems, part, config, workers)
    return entry, [answer.text for answer in made[start:]]


def _graded(
    name: str, problems: list[tasks.Problem], made: list[Answer], config: EvaluateConfig, workers: Workers
) -> dict[str, Any]:
    number = config.num_samples
    texts = [[answer.text for answer in made[i : i + number]] for i in range(0, len(made), number)]
    grades = tasks.grade(name, problems, texts, workers)
    return {
        **{metric: figure.as_dict() for metric, figure in tasks.results(grades, config.pass_k).items()},
        "ungraded": grades.ungraded,
        "mean_tokens": sum(answer.tokens for answer in made) / len(made),
        "cut_off": sum(not answer.stopped for answer in made) / len(made),
        "right": [sum(row) for row in grades.right],
    }


def _baseline_texts(baseline: Baseline, asked: Asked, store: Store, mesh: Mesh | None) -> tuple[list[str], list[str]]:
    """Returns the baseline's answers, and those with another seed for the control (empty for a file)."""
    if baseline.subject is None:
        return baseline.outputs, []
    config = asked.config
    policy = baseline.subject.load(config.dtype, mesh)
    seeds = (config.seed, config.seed + 1) if config.control else (config.seed,)
    wanted = [request for seed in seeds for request in asked.of_winrate(policy, seed)]
    made = answers(policy, wanted, store, parameters_digest(policy.params), config.batch_size, baseline.label)
    texts, number = [answer.text for answer in made], len(asked.instructions)
    return texts[:number], texts[number:]


class _WinRates(NamedTuple):
    """Win rates of the subjects of an evaluation."""

    asked: Asked
    baseline: Baseline
    texts: tuple[list[str], list[str]]
    """The baseline's answers, and those for the control."""
    directory: Path

    def judged(
        self, subjects: list[Subject], texts: list[list[str]], judge: Judge, verdicts: Store, endpoint: Endpoint | None
    ) -> dict[str, Any]:
        """Judges every subject and the control; writes outputs and annotations in AlpacaEval's format."""
        base, other = self.texts
        named = [(subject.label, written) for subject, written in zip(subjects, texts, strict=True)]
        control = [(f"{self.baseline.label} (control)", other)] if other else []
        self._outputs(self.baseline.label, base)
        for label, written in named:
            self._outputs(label, written)
        if endpoint is not None:
            pairs = [
                pair
                for _, made in [*named, *control]
                for pair in missing(self._instructions, base, made, judge, verdicts)
            ]
            print(endpoint.estimate([question(pair) for pair in dict.fromkeys(pairs)]), flush=True)
        told: dict[str, Any] = {"judge": judge.name, "judge_identity": judge.identity, "baseline": self.baseline.label}
        told["against"] = {}
        for label, written in [*named, *control]:
            compared = compare(self._instructions, base, written, judge, verdicts)
            told["against"][label] = outcome(compared).as_dict()
            self._annotations(label, compared, judge)
        if endpoint is not None:
            counts = {"counts": dict(endpoint.counts), "models": dict(endpoint.models)}
            told["endpoint"] = {**counts, "parameters": endpoint.parameters}
        return told

    @property
    def _instructions(self) -> list[Instruction]:
        return self.asked.instructions

    def _outputs(self, label: str, texts: list[str]) -> None:
        write_text(self.directory / f"outputs-{_file(label)}.json", outputs_json(self._instructions, texts, label))

    def _annotations(self, label: str, compared: list[Compared], judge: Judge) -> None:
        text = annotations_json(compared, self.baseline.label, label, judge.name)
        write_text(self.directory / f"annotations-{_file(label)}.json", text)


def _file(label: str) -> str:
    """Returns a label in a form that is safe in file names."""
    return re.sub(r"[^\w.@-]+", "_", label).strip("_.")[-100:] or "model"
