"""Every metric by name, with its definition.

Every metric has its meaning in `METRICS`; one that is not there is not written.
"""

from __future__ import annotations

import re

from lsp_jax.core.errors import InputError

PHASES = ("weight_sync", "challenge", "solve", "reward", "reference", "update", "log")

_ROLE_METRICS = {
    "reward": "mean reward of the {role}, over what counts in its loss",
    "reward_std": "standard deviation of the {role}'s rewards over what counts in its loss",
    "loss": "the {role}'s part of the loss",
    "kl": "KL to the reference, k3's value per token whichever estimator is differentiated",
    "entropy": "entropy of the {role}'s distribution, nats per token",
    "clip_ratio/low": "fraction of the {role}'s tokens whose ratio is below the clip range and whose advantage is < 0",
    "clip_ratio/high": "fraction of the {role}'s tokens whose ratio is above the clip range and whose advantage is > 0",
    "kl_to_old": "KL of the policy that played to the current one, k3's value per token of the {role}",
    "importance_weight": "mean weight of truncated importance correction over the {role}'s tokens",
    "completions/mean_length": "mean tokens of a completion of the {role}, its stop token included",
    "completions/max_length": "tokens of the longest completion of the {role}",
    "completions/clipped_ratio": "fraction of the {role}'s completions cut off at the maximum length",
}

METRICS: dict[str, str] = {
    "iteration": "iterations done, this one included",
    **{
        f"{role}/{name}": text.format(role=role.capitalize())
        for role in ("challenger", "solver")
        for name, text in _ROLE_METRICS.items()
    },
    "solver/frac_reward_zero_std": "fraction of queries whose valid answers all got one reward: nothing to learn there",
    "solver/prompts/mean_length": "mean tokens of the Solver's prompts, chat template included",
    "queries/valid_fraction": "fraction of queries that ended by themselves, have text, leak no tag and are on task",
    "queries/unique_fraction": "distinct queries over all queries of the iteration",
    "queries/leak_fraction": "fraction of queries that hold a control token or a tag of the chat template",
    "queries/value/<share>": "V(q), the mean task reward of a query's answers: the least, quartiles and most of them",
    "queries/nearest_similarity": "mean over queries of the highest similarity to one that was asked before",
    "queries/near_duplicate_fraction": "fraction of queries as near to an earlier one as memory.near_duplicate",
    "queries/cluster_entropy": "entropy of the iteration's clusters of queries: 1 all apart, 0 all near one another",
    "queries/distinct_1": "different words over all words of the iteration's queries",
    "queries/distinct_2": "different pairs of neighbouring words over all pairs of the iteration's queries",
    "answers/tag_fraction": "fraction of answers that hold something like a tag",
    "attempt": "times that the run had gone back when the iteration was played (health)",
    "resampled_fraction": "fraction of queries played anew because their answers all got one reward",
    "rewards/task_quality_correlation": "Pearson's correlation of R and R_Q over answers in the Solver's loss",
    "probe/reward": "mean reward of the policy's answers to the probe's prompts (health.probe)",
    "probe/gain": "how much that is above the reference's, prompt by prompt",
    "probe/standard_error": "standard error of that gain over the prompts",
    "probe/declined": "1 where the last gain was below -2 standard errors",
    "time/probe": "seconds of the look at the probe",
    "challenger/paused": "1 while an alarm keeps the Challenger from learning (health)",
    "queries/copy_fraction": "fraction of queries that repeat eight words in a row of the Challenger's prompt",
    "answers/valid_fraction": "fraction of answers that every reward component could score",
    "rewards/<name>/mean": "mean of the component <name> before its weight, over answers in the Solver's loss",
    "rewards/<name>/std": "standard deviation of the component <name> before its weight, over the same answers",
    "rewards/<name>/failed_fraction": "fraction of answers that the component <name> could not score: masked",
    "rewards/<name>/correlation/<other>": "Pearson's correlation of two components over answers in the Solver's loss",
    "sampling/token_mult_prob_error": "mean over tokens of exp|learner - sampler log-probability|, the worse role's; "
    "1 is exact, above 1.05 is an alarm",
    "sampling/<role>/token_mult_prob_error": "the same for one role",
    "loss": "joint loss of both roles, minimised",
    "grad_norm": "global norm of the joint gradient before clipping",
    "skipped_updates": "updates skipped since the start because something in them was not finite",
    "not_finite/component": "0, or the place in `learn.finite.component_names` of the first that was not finite",
    "learning_rate": "step size of this update",
    "completions/tokens": "tokens sampled in this iteration by both roles",
    "tokens_per_second": "tokens sampled over the seconds of challenge and solve, prefill included",
    **{f"time/{phase}": f"seconds in the phase {phase}" for phase in PHASES},
    **{
        f"limit/{phase}": f"least time that the phase {phase} could take on these devices over its time: 1 is the limit"
        for phase in ("challenge", "solve", "reference", "update")
    },
    "time/iteration": "seconds of the iteration, without writing its lines and checkpoint",
    "weight_sync/bytes": "bytes, on one device, of the parameters that play: cast and laid out before each iteration",
    "host_reads": "reads from device to host before the metrics; with compiled rewards one a chunk of decoding",
    "checkpoint/failed": "checkpoints since the start of this process that could not be written",
    "compile/count": "programs compiled since the start",
    "compile/seconds": "seconds spent compiling since the start",
}
"""Meaning of every metric by name; `<...>` in a name stands for anything."""

_PATTERNS = [
    (re.compile(re.sub(r"<(\w+)>", r"(?P<\1>.+)", name)), meaning) for name, meaning in METRICS.items() if "<" in name
]


def describe(name: str) -> str:
    """The meaning of a metric; raises KeyError when it is not in `METRICS`."""
    if name in METRICS and "<" not in name:
        return METRICS[name]
    for pattern, meaning in _PATTERNS:
        if match := pattern.fullmatch(name):
            return re.sub(r"<(\w+)>", lambda place: match.groupdict().get(place[1], place[0]), meaning)
    raise KeyError(f"{name!r} is not in lsp_jax.reporting.metrics.METRICS: add it there with its meaning")


def check_metric(name: str) -> None:
    """Raises InputError for the name of no metric; empty is none at all. (One of `<...>` may be absent in a run.)"""
    try:
        describe(name or "loss")
    except KeyError:
        raise InputError("metric_for_best_model", name, "no such metric: see metrics.jsonl of any run") from None
