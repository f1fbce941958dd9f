"""The report: what it shows of a run's files, that nothing in them becomes part of the page, when it is written."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lsp_jax import cli
from lsp_jax.reporting import html_report
from lsp_jax.reporting.transcripts import token_texts
from lsp_jax.text.tokenizer import Tokenizer
from reported import HOSTILE, metrics, write_lines, write_run
from test_tokenizer import SENTENCEPIECE_FILES, TEXTS, sentencepiece_dir
from tiny import write_tokenizer


class Page(HTMLParser):
    """The elements of a page as a browser finds them, and the data that the page holds."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.titles: list[str] = []
        self._in = self.data = self.policy = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        self._in = "data" if attributes.get("id") == "data" else tag
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"] or ""
        assert not {name for name in attributes if name.startswith("on")}
        assert not str(attributes.get("src") or attributes.get("href") or "#").startswith(("http", "//"))

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "data":
            self.data += data
        if self._in in ("title", "h1"):
            self.titles.append(data.strip())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "lsp <b>1", alarms=True)


def shown(*runs: Path) -> dict[str, Any]:
    """What the report of the runs holds."""
    return json.loads(Page(html_report.page(runs)).data)


def test_model_text_is_data_and_nothing_else(run: Path):
    text = html_report.page([run])
    page = Page(text)
    assert page.tags.count("script") == 3 and "img" not in page.tags
    assert page.titles == ["Self-play: lsp <b>1"] * 2
    assert page.policy.startswith("default-src 'none'; ") and "http" not in page.policy
    (data,) = json.loads(page.data)["runs"]
    assert {answer["text"] for record in data["queries"] for answer in record["answers"]} >= {HOSTILE}
    assert any(record["query"] == HOSTILE for record in data["queries"])


def test_what_is_shown_of_a_run(run: Path):
    found = shown(run)
    (data,) = found["runs"]
    assert data["metrics"]["iteration"] == list(range(1, 41))
    assert data["metrics"]["challenger/kl"][:3] == [0.02 / 40, None, 0.02 * 3 / 40]
    facts = dict(data["facts"])
    assert facts["iterations"] == "40 of 40" and facts["tokens sampled"] == "28,000"
    assert facts["Solver's reward"] == "0.238 → 0.778"  # means of four
    assert [alarm["action"] for alarm in data["alarms"]] == ["pause", "over"]
    numbers = [record["iteration"] for record in data["queries"]]
    assert len(set(numbers)) == html_report.SHOWN_ITERATIONS and {1, 40} <= set(numbers)
    assert {record["index"] for record in data["queries"]} == {0, 1, 2, 3}
    assert data["repeated"] == [
        {"query": HOSTILE, "count": 40, "first": 1, "last": 40},
        {"query": "What is 1 + 1?", "count": 40, "first": 1, "last": 40},
        {"query": "What is 2 + 2?", "count": 21, "first": 1, "last": 39},
    ]
    asked = {record["query"]: record["asked"] for record in data["queries"]}
    assert asked[HOSTILE] == 40 and asked["What is 40 + 2?"] == 1
    assert data["config"]["max_steps"] == "40" and data["config"]["play.num_generations"] == "4"
    assert data["started"]["versions.jax"] == "0.10.2"
    titles = {chart["title"]: chart["metrics"] for chart in found["charts"]}
    assert titles["Reward components"] == ["rewards/arithmetic/mean", "rewards/quality/mean"]
    assert "Probe vs. reference" not in titles
    assert set(found["meanings"]) == set(data["metrics"])
    assert found["meanings"]["rewards/quality/mean"].startswith("mean of the component quality before")


def test_a_long_run_is_thinned_to_its_last_iteration(tmp_path: Path):
    run = write_run(tmp_path / "long", last=3)
    write_lines(run / "metrics.jsonl", [metrics(number, 2501) for number in range(1, 2502)])
    (data,) = shown(run)["runs"]
    iterations = data["metrics"]["iteration"]
    assert len(iterations) <= html_report.MOST_POINTS and iterations[-1] == 2501
    assert {b - a for a, b in itertools.pairwise(iterations)} == {3}
    assert dict(data["facts"])["tokens sampled"] == f"{700 * 2501:,}"  # of all of them


@pytest.mark.parametrize("last", [1001, 1500, 1999, 12_000])
def test_the_probe_of_a_long_run_stays(tmp_path: Path, last: int):
    """It is in every tenth line, and lines two apart that end with an odd one hold none of them."""
    run = write_run(tmp_path / "long", last=3)
    lines = [metrics(number, last) for number in range(1, last + 1)]
    probed = [line | {"probe/gain": line["iteration"] / 10} if not line["iteration"] % 10 else line for line in lines]
    write_lines(run / "metrics.jsonl", probed)
    (data,) = shown(run)["runs"]
    points = [
        (iteration, gain)
        for iteration, gain in zip(data["metrics"]["iteration"], data["metrics"]["probe/gain"], strict=True)
        if gain is not None
    ]
    assert all(gain == iteration / 10 for iteration, gain in points)
    assert points[-1][0] == last - last % 10
    assert min(last // 10, html_report.MOST_POINTS // 2) <= len(points) <= html_report.MOST_POINTS
    assert len(data["metrics"]["iteration"]) <= 2 * html_report.MOST_POINTS
    assert data["metrics"]["iteration"][-1] == last


def test_a_run_under_way(tmp_path: Path):
    run = write_run(tmp_path / "run", last=4)
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"iteration": 5, "sol')
    assert shown(run)["runs"][0]["metrics"]["iteration"] == [1, 2, 3, 4]
    for name in ("metrics.jsonl", "transcripts.jsonl", "manifest.json"):
        (run / name).unlink()
    assert shown(run)["runs"][0]["metrics"] == {} and shown(run)["charts"] == []


def test_a_metric_of_another_version_is_shown_and_said_to_be_none(tmp_path: Path):
    run = write_run(tmp_path / "run", last=2)
    lines = [json.loads(line) | {"once/there": 1.0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shown(run)["meanings"]["once/there"] == "not a metric of this version"


def test_a_run_that_went_on_after_a_phase_was_renamed(tmp_path: Path):
    """Its first lines have one name, the later ones the other: both are there, with gaps."""
    run = write_run(tmp_path / "run", last=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["time/handover" if line["iteration"] <= 2 else "time/weight_sync"] = 0.5
    write_lines(run / "metrics.jsonl", lines)
    (data,) = shown(run)["runs"]
    assert data["metrics"]["time/handover"] == [0.5, 0.5, None, None]
    assert data["metrics"]["time/weight_sync"] == [None, None, 0.5, 0.5]


def test_several_runs_beside_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [write_run(tmp_path / place / "lsp", last=4, seed=seed) for seed, place in enumerate(("a", "b"))]
    found = shown(*runs)["runs"]
    assert [run["name"] for run in found] == list(map(str, runs))
    assert [run["config"]["seed"] for run in found] == ["0", "1"]
    monkeypatch.chdir(tmp_path)
    assert html_report.write_report(runs) == Path("comparison.html") and Path("comparison.html").is_file()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert cli.main(["report", str(run), "--output", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").read_text("utf-8") == (run / "report.html").read_text("utf-8")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.html"]


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = write_run(tmp_path / "broken", last=2)
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    (broken / "metrics.jsonl").write_text("\n".join([lines[0][:-5], lines[1]]) + "\n")
    torn = write_run(tmp_path / "torn", last=2)
    (torn / "manifest.json").write_text('{"versions": {')
    for arguments, words in (
        ([], "runs = ()"),
        ([tmp_path / "none"], "config.json"),
        ([run, "--output", tmp_path], "is a directory"),
        ([run, "--output", run / "config.json" / "x.html"], "output = "),
        ([broken], "metrics.jsonl:1"),
        ([torn], "manifest.json"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err


def test_a_report_under_way_takes_little_time_and_stops_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now, written = [100.0], []

    def write(folders: list[Path]) -> None:
        written.append(now[0])
        now[0] += 2.0
        if len(written) == 3:
            raise OSError("the disk is full")

    monkeypatch.setattr(html_report.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(html_report, "write_report", write)
    live = html_report.LiveReport(run)
    for _ in range(30):
        live.refresh()
        now[0] += 10.0
    assert written == [100.0, 202.0, 304.0]  # 2 seconds of writing, then a hundred without
    assert "report not written: OSError: the disk is full" in capsys.readouterr().err
    live.refresh(last=True)
    assert len(written) == 4


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokens_joined_are_the_text(kind: str, tmp_path: Path):
    write_tokenizer(tmp_path / "bytes")
    if kind == "sentencepiece":
        sentencepiece_dir(tmp_path / kind, SENTENCEPIECE_FILES[1])
    tokenizer = Tokenizer.from_pretrained(tmp_path / kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        found = token_texts(tokenizer, ids, [-0.123456] * len(ids))
        assert "".join(piece for piece, _ in found) == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(found) == len(ids) and all(logprob == -0.1235 for _, logprob in found)
    pieces = [piece for piece, _ in token_texts(tokenizer, tokenizer.encode("a 中 b"), [0.0] * 99)]
    assert "中" in "".join(pieces) and "\ufffd" not in "".join(pieces)
