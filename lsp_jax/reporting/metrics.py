"""Definitions of all metrics by name; metrics without a definition in `METRICS` cannot be logged."""

from __future__ import annotations

import re

from lsp_jax.core.errors import InputError

PHASES = ("weight_sync", "challenge", "solve", "reward", "reference", "update", "log")

_ROLE_METRICS = {
    "reward": "mean reward of the {role} over the unmasked rows of its loss",
    "reward_std": "standard deviation of the {role}'s rewards over the unmasked rows of its loss",
    "loss": "the {role}'s part of the loss",
    "kl": "KL to the reference per token, always estimated by k3",
    "entropy": "entropy of the {role}'s distribution, nats per token",
    "clip_ratio/low": "fraction of the {role}'s tokens whose ratio is below the clip range and whose advantage is < 0",
    "clip_ratio/high": "fraction of the {role}'s tokens whose ratio is above the clip range and whose advantage is > 0",
    "kl_to_old": "KL of the rollout policy to the current one per token of the {role}, estimated by k3",
    "importance_weight": "mean weight of truncated importance correction over the {role}'s tokens",
    "completions/mean_length": "mean length of the {role}'s completions in tokens, including the stop token",
    "completions/max_length": "length of the longest completion of the {role} in tokens",
    "completions/clipped_ratio": "fraction of the {role}'s completions truncated at the maximum length",
}

METRICS: dict[str, str] = {
    "iteration": "number of completed iterations, including this one",
    **{
        f"{role}/{name}": text.format(role=role.capitalize())
        for role in ("challenger", "solver")
        for name, text in _ROLE_METRICS.items()
    },
    "solver/frac_reward_zero_std": "fraction of queries whose valid answers all have the same reward: no gradient",
    "solver/prompts/mean_length": "mean length of the Solver's prompts in tokens, including the chat template",
    "queries/valid_fraction": "fraction of queries that are complete, not blank, without template tags and on task",
    "queries/unique_fraction": "distinct queries over all queries of the iteration",
    "queries/leak_fraction": "fraction of queries that contain a control token or a tag of the chat template",
    "queries/value/<share>": "V(q), the mean task reward of a query's answers: minimum, quartiles and maximum",
    "queries/nearest_similarity": "mean over queries of the highest similarity to an earlier query",
    "queries/near_duplicate_fraction": "fraction of queries with a similarity of at least memory.near_duplicate to an "
    "earlier one",
    "queries/cluster_entropy": "normalised entropy of the iteration's query clusters: 1 all distinct, 0 all similar",
    "queries/distinct_1": "distinct words over all words of the iteration's queries",
    "queries/distinct_2": "distinct bigrams over all bigrams of the iteration's queries",
    "answers/tag_fraction": "fraction of answers that contain text similar to a tag",
    "attempt": "number of rollbacks before the iteration (health)",
    "resampled_fraction": "fraction of queries resampled because their answers all had the same reward",
    "rewards/task_quality_correlation": "Pearson's correlation of R and R_Q over answers in the Solver's loss",
    "probe/reward": "mean reward of the policy's answers to the probe's prompts (health.probe)",
    "probe/gain": "mean difference of that to the reference's reward, paired by prompt",
    "probe/standard_error": "standard error of that gain over the prompts",
    "probe/declined": "1 if the last gain was below -2 standard errors",
    "time/probe": "seconds spent evaluating the probe",
    "challenger/paused": "1 while an alarm pauses the Challenger's learning (health)",
    "queries/copy_fraction": "fraction of queries that repeat eight consecutive words of the Challenger's prompt",
    "answers/valid_fraction": "fraction of answers that every reward component could score",
    "rewards/<name>/mean": "mean of the component <name> before weighting, over answers in the Solver's loss",
    "rewards/<name>/std": "standard deviation of the component <name> before weighting, over the same answers",
    "rewards/<name>/failed_fraction": "fraction of answers that the component <name> could not score and masked",
    "rewards/<name>/correlation/<other>": "Pearson's correlation of two components over answers in the Solver's loss",
    "sampling/token_mult_prob_error": "mean over tokens of exp|learner - sampler log-probability|, for the worse role; "
    "1 is exact, above 1.05 causes a warning",
    "sampling/<role>/token_mult_prob_error": "the same for one role",
    "loss": "joint loss of both roles",
    "grad_norm": "global norm of the joint gradient before clipping",
    "skipped_updates": "updates skipped since the start because of non-finite values",
    "not_finite/component": "0, or the index in `learn.nonfinite.component_names` of the first non-finite component",
    "learning_rate": "learning rate of this update",
    "completions/tokens": "tokens sampled in this iteration by both roles",
    "tokens_per_second": "sampled tokens over the seconds of challenge and solve, including prefill",
    **{f"time/{phase}": f"seconds in the phase {phase}" for phase in PHASES},
    **{
        f"limit/{phase}": f"lower time bound of the phase {phase} on these devices over its time: 1 is the limit"
        for phase in ("challenge", "solve", "reference", "update")
    },
    "time/iteration": "seconds of the iteration, without writing metrics, transcripts and checkpoints",
    "weight_sync/bytes": "bytes per device of the rollout parameters, which are cast and resharded in each iteration",
    "host_reads": "device-to-host reads before the metrics; with compiled rewards one per decoding chunk",
    "checkpoint/failed": "failed checkpoint saves since the start of this process",
    "compile/count": "programs compiled since the start",
    "compile/seconds": "seconds spent compiling since the start",
}
"""Definition of every metric by name; `<...>` in a name matches any text."""

_PATTERNS = [
    (re.compile(re.sub(r"<(\w+)>", r"(?P<\1>.+)", name)), meaning) for name, meaning in METRICS.items() if "<" in name
]


def describe(name: str) -> str:
    """Returns the definition of a metric; raises KeyError if it is not in `METRICS`."""
    if name in METRICS and "<" not in name:
        return METRICS[name]
    for pattern, meaning in _PATTERNS:
        if match := pattern.fullmatch(name):
            return re.sub(r"<(\w+)>", lambda place: match.groupdict().get(place[1], place[0]), meaning)
    raise KeyError(f"{name!r} is not in lsp_jax.reporting.metrics.METRICS: add its definition there")


def check_metric(name: str) -> None:
    """Raises InputError for an unknown metric name; empty is allowed. (A `<...>` metric may be absent in a run.)"""
    try:
        describe(name or "loss")
    except KeyError:
        raise InputError("metric_for_best_model", name, "no such metric: see metrics.jsonl of any run") from None
