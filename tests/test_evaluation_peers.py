"""Evaluation beside the tools that others use: alpaca_eval, lm-eval, and a real OpenAI-compatible server.

make test-peers
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.evaluate import statistics
from lsp_jax.evaluate.generation import Request, answers
from lsp_jax.evaluate.result_cache import Store
from lsp_jax.evaluate.tasks import grade, load_task
from lsp_jax.evaluate.winrate import annotations_json, compare, outcome, outputs_json
from lsp_jax.play.generate import prompt_ids
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.reward.execution.pool import Workers
from test_tasks import write
from test_winrate import BASE, INSTRUCTIONS, MODEL, SCRIPT, Scripted

pytestmark = pytest.mark.full


def fifty_problems() -> list[dict[str, str]]:
    """In GSM8K's form, easy enough for a model of 135 M parameters to get some right."""
    rows = []
    for n in range(25):
        a, b = 3 + n % 9, 2 + n % 7
        rows.append(
            {
                "question": f"Ann has {a} apples and gets {b} more. How many apples has she now?",
                "answer": f"{a} + {b}\n#### {a + b}",
            }
        )
        rows.append(
            {"question": f"A box holds {a} pens. How many pens are in {b} boxes?", "answer": f"{a} * {b}\n#### {a * b}"}
        )
    return rows


# --- alpaca_eval ---------------------------------------------------------------------------------------------------


def test_alpaca_eval_reads_our_files_and_finds_our_win_rate(tmp_path: Path):
    """Its own annotator takes our outputs with the cached verdicts as they are, and its metric gives our figures."""
    alpaca = pytest.importorskip("alpaca_eval")
    metrics = pytest.importorskip("alpaca_eval.metrics")
    with Store(tmp_path / "v.jsonl") as store:
        compared = compare(INSTRUCTIONS, BASE, MODEL, Scripted(SCRIPT), store)
    ours = outcome(compared)
    (tmp_path / "outputs.json").write_text(outputs_json(INSTRUCTIONS, MODEL, "ours"))
    (tmp_path / "base.json").write_text(outputs_json(INSTRUCTIONS, BASE, "base"))
    (tmp_path / "annotations.json").write_text(annotations_json(compared, "base", "ours", "scripted"))
    theirs = metrics.get_winrate(json.loads((tmp_path / "annotations.json").read_text()))
    assert theirs["win_rate"] == pytest.approx(100 * ours.overall.win_rate.value)
    assert theirs["n_total"] == ours.overall.win_rate.number == 6
    assert (theirs["n_wins"], theirs["n_draws"], theirs["n_wins_base"]) == (2, 3, 1)

    class Cached:
        """What alpaca_eval calls in place of its own annotator: it pairs the outputs, ours says what was judged."""

        def __init__(self, **_: Any) -> None:
            self.annotator_name = "scripted"

        def annotate_head2head(self, outputs_1: Any, outputs_2: Any, **_: Any) -> list[dict[str, Any]]:
            preferences = {c.instruction.text: c.score for c in compared}
            pairs = zip(outputs_1.to_dict("records"), outputs_2.to_dict("records"), strict=True)
            rows = [
                {
                    "instruction": one["instruction"],
                    "output_1": one["output"],
                    "output_2": two["output"],
                    "generator_2": two["generator"],
                }
                for one, two in pairs
            ]
            return [
                {**row, "preference": None if (s := preferences[row["instruction"]]) is None else 1 + s} for row in rows
            ]

    leaderboard, annotated = alpaca.evaluate(
        model_outputs=str(tmp_path / "outputs.json"),
        reference_outputs=str(tmp_path / "base.json"),
        annotators_config="scripted",
        Annotator=Cached,
        fn_metric="get_winrate",
        sort_by="win_rate",
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
    )
    assert [row["output_2"] for row in annotated] == MODEL and [row["output_1"] for row in annotated] == BASE
    assert leaderboard.loc["ours"]["win_rate"] == pytest.approx(100 * ours.overall.win_rate.value)


def test_length_controlled_is_near_alpaca_evals(tmp_path: Path):
    """Its `length_controlled_minimal` formula through its own fit (a lasso chosen by cross-validation)."""
    glm = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    np, pd = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    extra = rng.normal(150, 300, 600)
    length = np.tanh(extra / extra.std(ddof=1))
    scores = rng.binomial(1, 1 / (1 + np.exp(-(-0.5 + 1.2 * length)))).astype(float)
    frame = pd.DataFrame({"length": length, "one": np.ones(600), "preference": scores})
    fit = glm.fit_LogisticRegressionCV(frame, "preference", is_ytrue_proba=True, n_splits=5)
    theirs = fit.predict_proba(pd.DataFrame({"length": [0.0], "one": [1.0]}))[0, 1]
    assert statistics.length_controlled(scores, extra) == pytest.approx(theirs, abs=0.02)


# --- lm-eval -------------------------------------------------------------------------------------------------------

COLUMNS = 96
TASK = """\
task: lsp_gsm8k
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n\\nWork it out step by step. End with a line that has #### and then the final number."
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs: {{until: ["<|im_end|>"], do_sample: false, max_gen_toks: {columns}}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def test_lm_eval_on_the_export_agrees(demo_dir: Path, tmp_path: Path):
    """The same 50 problems, prompt and greedy decoding: as many right through our path as through lm-eval's."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    file = write(tmp_path / "fifty.jsonl", fifty_problems())
    policy = lsp.load_pretrained(demo_dir)
    lsp.save_pretrained(policy, tmp_path / "export")
    problems = load_task("gsm8k", file)
    wanted = [Request(tuple(prompt_ids(policy, p.prompt, COLUMNS)), COLUMNS, SamplingConfig(0.0)) for p in problems]
    with Store(tmp_path / "a.jsonl") as store, Workers() as workers:
        texts = [answer.text for answer in answers(policy, wanted, store, "demo", batch_size=25)]
        grades = grade("gsm8k", problems, [[text] for text in texts], workers)
    right = [row[0] for row in grades.right]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lsp_gsm8k.yaml").write_text(TASK.format(file=file, columns=COLUMNS))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "export"), dtype="float32", device="cpu", batch_size=10),
        tasks=["lsp_gsm8k"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["lsp_gsm8k"], key=lambda sample: sample["doc_id"])
    theirs = [sample["resps"][0][0] for sample in samples]
    same = [ours.strip() == other.strip() for ours, other in zip(texts, theirs, strict=True)]
    marks = [bool(sample["exact_match"]) for sample in samples]
    accuracy = found["results"]["lsp_gsm8k"]["exact_match,last-number"]
    marked = sum(a == b for a, b in zip(right, marks, strict=True))
    print(f"of 50 right: {sum(right)}, lm-eval {50 * accuracy:.0f}; same text {sum(same)}, same mark {marked}")
    assert sum(same) >= 48 and 0 < sum(right) < 50
    assert sum(right) / 50 == accuracy


# --- a real server -------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(demo_dir: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and log of `transformers serve` with the demo model."""
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log, command = tmp_path / "serve.log", Path(sys.executable).with_name("transformers")
    arguments = [
        "serve",
        str(demo_dir),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            [command, *arguments],
            stdout=out,
            stderr=out,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        for _ in range(300):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_killed_half_way_and_run_again_asks_nothing_twice(demo_dir: Path, serve: tuple[str, Path], tmp_path: Path):
    """The whole command against a real server: what was answered before the kill is not asked for again."""
    url, log = serve
    instructions = [{"instruction": f"Name {n} fruits.", "dataset": "helpful_base"} for n in range(2, 12)]
    (tmp_path / "instructions.json").write_text(json.dumps(instructions))
    baseline = [{**row, "output": "I do not know.", "generator": "silent"} for row in instructions]
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    command = [sys.executable, "-m", "lsp_jax", "evaluate", str(demo_dir), "--output-dir", str(tmp_path / "out")]
    command += ["--winrate-against", str(tmp_path / "baseline.json"), "--max-completion-length", "24"]
    command += [
        "--judge.endpoint.url",
        url,
        "--judge.endpoint.model",
        str(demo_dir),
        "--judge.endpoint.allow-local-http",
    ]
    command += ["--judge.endpoint.concurrency", "2", "--judge.endpoint.max-tokens", "8"]
    verdicts = tmp_path / "out" / "verdicts.jsonl"

    def asked() -> int:
        return len(re.findall(r"POST /v1/chat/completions", log.read_text()))

    with subprocess.Popen(command) as process:
        while process.poll() is None and (not verdicts.exists() or verdicts.read_bytes().count(b"\n") < 8):
            time.sleep(0.05)
        assert process.poll() is None, "ended before it could be killed"
        process.kill()
    time.sleep(5)  # what the server was still busy with ends
    kept, before = verdicts.read_bytes().count(b"\n"), asked()
    assert 8 <= kept < 20
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{20 - kept} questions" in done.stdout
    assert asked() - before == 20 - kept
    keys = [json.loads(line)["key"] for line in verdicts.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 20
    results = json.loads((tmp_path / "out" / "results.json").read_text())["winrate"]
    (told,) = results["against"].values()
    assert told["wins"] + told["ties"] + told["losses"] + told["left_out"] == 10 and told["failed"] == 0
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 questions" in again.stdout and asked() - before == 20 - kept
