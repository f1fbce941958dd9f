"""The model card of an exported policy: base model, recipe, metrics of the run, citation."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lsp_jax.checkpoint.provenance import reference_of
from lsp_jax.checkpoint.run_dir import METRICS_FILE
from lsp_jax.config import MAY_CHANGE, TrainConfig, flat
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_jsonl

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOLD = (
    *("solver/reward", "challenger/reward", "solver/kl", "challenger/kl", "solver/entropy", "challenger/entropy"),
    *("solver/completions/mean_length", "challenger/completions/mean_length"),
    *("queries/valid_fraction", "queries/unique_fraction", "probe/gain"),
)
"""Metrics whose first and last values the card shows."""
_CITATION = """\
@article{kuba2025language,
  title   = {Language Self-Play For Data-Free Training},
  author  = {Kuba, Jakub Grudzien and Gu, Mengting and Ma, Qi and Tian, Yuandong and Mohan, Vijai and Chen, Jason},
  journal = {arXiv preprint arXiv:2509.07414},
  year    = {2025}
}"""


def model_card(run: Path, step: int, adapters: bool = False) -> str:
    """Returns the README.md for the policy at checkpoint `step` of a run, or for its `adapters` alone."""
    config = TrainConfig.load(run / "config.json")
    base, commit = _base(run, config)
    metrics = _metrics(run, step)
    method = "GRPO on a data set" if config.data.source else "Language Self-Play"
    if not config.data.source and not (config.loss.use_quality and config.reward.quality_weight):
        method = "Language Self-Play without the quality reward (LSP-Zero)"
    library = "peft" if adapters else "transformers"
    header = [f"library_name: {library}", "pipeline_tag: text-generation", "tags: [lsp_jax, language-self-play]"]
    if commit and _HUB_ID.fullmatch(base):
        header.insert(0, f"base_model: {base}")
    name, tokens = _plain(base if commit else _last(base)), sum(line.get("completions/tokens", 0.0) for line in metrics)
    sections = [
        "\n".join(["---", *header, "---"]),
        f"# {'Adapters for ' if adapters else ''}{_plain(_last(base))}, after {step} iterations of {method}",
        f"Trained by lsp_jax from `{name}`{f' at commit {commit}' if commit else ''} for {step} of {config.max_steps} "
        f"iterations of {config.play.num_queries} queries with {config.play.num_generations} answers each; "
        f"{tokens:,.0f} tokens were sampled. The base model's license and limitations apply.",
        "## Metrics of the run",
        _results(metrics),
        "Rewards are those of the training run, not a benchmark.",
        "## Recipe",
        "Settings that affect what is learned and differ from the defaults:",
        "\n".join(f"    {name} = {json.dumps(value)}" for name, value in _settings(config).items()),
        "## Citation",
        "```bibtex\n" + _CITATION + "\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _base(run: Path, config: TrainConfig) -> tuple[str, str]:
    """Returns the base model and its commit on the hub ("" for a local directory).

    Earlier stages (`init_from`) are followed back as far as their folders exist.
    """
    seen = {run.resolve()}
    while config.init_from:
        run = Path(config.init_from).expanduser()
        if run.resolve() in seen:  # a cycle: the folder was recreated from one of its own stages
            return config.init_from, ""
        seen.add(run.resolve())
        try:
            config = TrainConfig.load(run / "config.json")
        except InputError:
            return config.init_from, ""
    with suppress(InputError):
        return config.model, reference_of(run).get("commit", "")
    return config.model, ""


def _last(name: str) -> str:
    """Returns the last part of a path or hub id; the rest of a path may identify a user or machine."""
    return Path(name).name or name


def _metrics(run: Path, step: int) -> list[dict[str, Any]]:
    """Returns the run's metrics up to iteration `step`; empty if the file is missing."""
    lines = read_jsonl(run / METRICS_FILE, skip="invalid")
    return [line for line in lines if line.get("iteration", step + 1) <= step]


def _results(metrics: list[dict[str, Any]]) -> str:
    rows = []
    for name in TOLD:
        values = [(line["iteration"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]
        if values:
            (first, begin), (last, end) = values[0], values[-1]
            rows.append(f"| `{name}` | {begin:.4g} (iteration {first}) | {end:.4g} (iteration {last}) |")
    return "\n".join(["| metric | first | last |", "|---|---|---|", *rows]) if rows else "Not available."


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings, by dotted name, that affect what is learned and are not defaults; paths are shortened."""
    default = flat(TrainConfig())
    return {
        name: _last(value) if isinstance(value, str) and value.startswith(("/", "~", ".")) else value
        for name, value in flat(config).items()
        if value != default[name] and name not in MAY_CHANGE
    }


def _plain(text: str) -> str:
    """Returns a name with the characters that are special in Markdown replaced by `?`."""
    return "".join(character if character.isprintable() and character not in "`<>|[]" else "?" for character in text)
