"""Checks of a run before its first long compilation for problems that raise no error: findings with remedies.

Invalid configurations are rejected earlier, by `setup`. Training runs these checks too and stops at an error;
`lsp-jax doctor` runs only them, and also scores a pair of example answers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.checkpoint.run_dir import CHECKPOINTS
from lsp_jax.config import TrainConfig
from lsp_jax.core import runtime
from lsp_jax.core.console import printable
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import existing_part
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import replicate, row_shards, use_mesh
from lsp_jax.perf.chips import GIB
from lsp_jax.perf.memory import USED, device_memory, host_memory, update_bytes
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import HostReward
from lsp_jax.reward.scoring import score_episode
from lsp_jax.text.judge_prompts import judge_messages, judge_template, load_criteria, text_judge_template
from lsp_jax.text.prompts import SLOT, template_pieces
from lsp_jax.text.tokenizer import Tokenizer
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup

Level = Literal["ok", "warning", "error"]

QUERY, ANSWER = "What is 3 + 4?", "It is 7."


class Finding(NamedTuple):
    """The result of one check."""

    level: Level
    check: str
    """Subject of the check."""
    message: str
    remedy: str = ""
    """What to do; empty if nothing is wrong."""

    def __str__(self) -> str:
        line = f"{self.level:7}  {self.check}: {self.message}"
        return f"{line}: {self.remedy}" if self.remedy else line


def examine(run: Run, params: Params) -> list[Finding]:
    """Runs all quick checks, without side effects; may be called in all processes. `params` are those that the run
    starts from."""
    tokenizer = run.policy.tokenizer
    return [
        _vocabulary(run, tokenizer),
        _stop_ids(tokenizer),
        *_prompts(run, tokenizer),
        _kl_gradient(run),
        _mesh(run),
        _memory(run),
        _disk(run, params),
    ]


# --- tokens and prompts ----------------------------------------------------------------------------------------------


def _vocabulary(run: Run, tokenizer: Tokenizer) -> Finding:
    """Reports the vocabulary; a tokenizer larger than the model has already been rejected."""
    rows, tokens = run.policy.config.vocab_size, tokenizer.vocab_size
    unused = f", {rows - tokens} rows of the embedding have no token" if rows > tokens else ""
    pad = f"padding {_shown(tokenizer, [tokenizer.pad_id])} ({tokenizer.pad_id})"
    return Finding("ok", "vocabulary", f"{tokens} tokens, model {rows}{unused}; {pad}")


def _stop_ids(tokenizer: Tokenizer) -> Finding:
    """Checks that the token that ends an answer in the chat template is a stop id."""
    stops = tokenizer.stop_ids
    shown = ", ".join(f"{_shown(tokenizer, [token])} ({token})" for token in stops)
    messages = [{"role": "user", "content": SLOT}, {"role": "assistant", "content": SLOT}]
    try:
        tail = template_pieces(tokenizer, messages, add_generation_prompt=False)[-1]
    except InputError:  # a template for a single turn is enough to train the Solver on data
        return Finding("ok", "stop ids", f"{shown}; the chat template has no assistant turn to compare with")
    end = next((token for token in tail if token in tokenizer.special_ids or token in stops), None)
    if end in stops:
        return Finding("ok", "stop ids", shown)
    if end is None:
        remedy = "answers end only if the model emits one of them on its own: watch the clipped ratios"
        return Finding("warning", "stop ids", f"{shown}; the chat template ends an answer with no such token", remedy)
    remedy = f"add {end} to eos_token_id in generation_config.json, or answers run to the maximum length"
    message = f"{shown}; the chat template ends an answer with {_shown(tokenizer, [end])} ({end})"
    return Finding("warning", "stop ids", message, remedy)


def _prompts(run: Run, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Compares each role's prompt with the ids of the chat template, and decodes it back to text."""
    prompts, reward = run.game.prompts, run.config.reward
    if run.data is None:
        task = prompts.challenger_ids[: len(prompts.challenger_ids) - len(prompts.query_prefix_ids)]
        expected = tokenizer.chat_ids(run.config.prompts.challenger)
        yield _prompt(tokenizer, "Challenger's prompt", list(task), expected, [run.config.prompts.challenger])
    query, answer = tokenizer.encode(QUERY), tokenizer.encode(ANSWER)
    spliced = [*prompts.solver.prefix_ids, *query, *prompts.solver.suffix_ids]
    yield _prompt(tokenizer, "Solver's prompt", spliced, tokenizer.chat_ids(QUERY), [QUERY])
    if reward.quality_weight:
        criteria = load_criteria(reward.rubric)
        make = judge_template if reward.quality_mode == "logits" else text_judge_template
        judge = make(tokenizer, criteria)
        spliced = [*judge.rubric_ids, *query, *judge.middle_ids, *answer, *judge.tail_ids]
        expected = tokenizer.chat_ids(judge_messages(criteria, reward.quality_mode, QUERY, ANSWER))
        yield _prompt(tokenizer, "judge's prompt", spliced, expected, [QUERY, ANSWER])


def _prompt(tokenizer: Tokenizer, name: str, ids: list[int], expected: list[int], texts: list[str]) -> Finding:
    """Compares the `ids` that a role gets with the `expected` ids of the chat template, which must contain `texts`.

    Spaces are ignored: SentencePiece adds one at the start of a text, which a sampled query does not have.
    """
    bos = tokenizer.bos_id
    if bos is not None and expected[:2] == [bos, bos]:
        remedy = "the chat template adds BOS twice: remove one from chat_template"
        return Finding("error", name, f"begins with {_shown(tokenizer, [bos, bos])}", remedy)
    decoded = tokenizer.decode(expected)
    lost = [text for text in texts if text.strip() not in decoded]
    if lost:
        remedy = "the chat template changes message text, so the role does not see the configured prompt"
        return Finding("warning", name, f"{lost[0]!r} is not in the decoded prompt", remedy)
    if tokenizer.decode(ids).replace(" ", "") != decoded.replace(" ", ""):
        pairs = zip(ids, expected, strict=False)
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(expected)))
        template, prompt = (_shown(tokenizer, row[at : at + 4]) for row in (expected, ids))
        remedy = "the prompt differs from the chat template: please report this with the template"
        return Finding("error", name, f"at token {at} the template has {template}, the prompt {prompt}", remedy)
    same = "equal to the chat template's" if ids == expected else "with the chat template's text, tokenised differently"
    return Finding("ok", name, f"{len(ids)} tokens {same}, ending {_shown(tokenizer, ids[-6:])}")


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(printable(tokenizer.decode(ids), 60))


# --- objective, memory and disk --------------------------------------------------------------------------------------

KL_GRADIENTS = {
    "k1": "zero",
    "k2": "that of KL(policy || reference)",
    "k3": "that of KL(reference || policy)",
    "full": "that of KL(policy || reference)",
}
"""Expected on-policy gradient of each KL estimator (`learn/losses.py`)."""


def _kl_gradient(run: Run) -> Finding:
    loss = run.config.loss
    if not loss.beta:
        return Finding("ok", "KL", "no KL to the reference (loss.beta 0)")
    message = f"the expected gradient of {loss.kl_estimator} is {KL_GRADIENTS[loss.kl_estimator]}"
    if loss.kl_estimator != "k1":
        return Finding("ok", "KL", message)
    remedy = "the policy is not pulled to the reference: use --loss.kl-estimator k2, k3 or full"
    return Finding("warning", "KL", message, remedy)


def _mesh(run: Run) -> Finding:
    """Reports the mesh, and warns if answers do not divide it; heads that do not have already been rejected."""
    model, devices = run.policy.config, jax.device_count()
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} of keys and values"
    if run.mesh is None:
        return Finding("ok", "mesh", f"one device ({jax.devices()[0].device_kind}); {heads}")
    sizes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    rows = run.config.play.num_queries * run.config.play.num_generations
    shards = run.mesh.size // run.mesh.shape["tensor"]
    if rows % shards:
        remedy = f"not sharded over all of them: make num_queries x num_generations a multiple of {shards}"
        return Finding("warning", "mesh", f"{sizes}; {rows} answers for {shards} row shards", remedy)
    return Finding("ok", "mesh", f"{sizes} of {devices} devices; {heads}; {rows // shards} answers per row shard")


def _memory(run: Run) -> Finding:
    """Compares the estimated memory of the update with that of a device, or on CPUs of the host."""
    scorer = run.reward_model and run.reward_model.config
    needed = update_bytes(run.game, run.config, scorer, run.mesh, run.data.width if run.data else 0)
    limit, place = device_memory(), "a device"
    if limit is None:
        limit, place = host_memory(), "this host"
        needed *= 1 if run.mesh is None else len(run.mesh.local_devices)
    message = f"about {needed / GIB:.2f} GiB for the update"
    if limit is None:
        return Finding("ok", "memory", f"{message}; memory limit unknown")
    message = f"{message} of {limit / GIB:.2f} on {place}"
    if needed <= USED * limit:
        return Finding("ok", "memory", message)
    remedy = (
        "lower --optimizer.micro-batch-size and --optimizer.logprob-chunk, use --optimizer.moment-dtype bfloat16 or "
        "--park-frozen, or more devices (lsp-jax plan predicts the memory on other hardware)"
    )
    return Finding("warning", "memory", message, remedy)


def _disk(run: Run, params: Params) -> Finding:
    """Checks for free space: a new checkpoint is written before the oldest is deleted, and the export at the end."""
    state = jax.eval_shape(run.game.init_train_state, params)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    exported = run.reference if run.game.learner.lora.rank else state.params  # adapters are merged
    export = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(exported))
    folder = run.directory / CHECKPOINTS
    existing = existing_part(run.directory)
    try:
        saved = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding("warning", "disk", f"{existing}: {error.strerror}", "its free space cannot be determined")
    if max(saved, default=0) >= run.config.max_steps:
        one = 0  # only the export is left to save
    number = run.config.save_total_limit + 1 + bool(run.config.metric_for_best_model)
    number += 2 * run.config.health.rolls_back
    needed = max(number - len(saved), 1) * one + export
    message = f"{one / GIB:.2f} GiB per checkpoint, {needed / GIB:.2f} needed, {free / GIB:.2f} free in {existing}"
    if free >= needed:
        return Finding("ok", "disk", message)
    level: Level = "error" if free < one and run.config.save_errors == "stop" else "warning"
    return Finding(level, "disk", message, "free some space, lower --save-total-limit, or use another --output-dir")


BAD_ANSWER = "no no no no"


def examine_all(config: TrainConfig) -> list[Finding]:
    """Runs all checks of the run `config`: loads its model, trains and writes nothing."""
    run, params = setup(config)
    try:
        with use_mesh(run.mesh):
            return [*examine(run, params), *examine_rewards(run)]
    finally:
        run.workers.close()


def examine_rewards(run: Run) -> list[Finding]:
    """Scores a correct and a nonsensical answer with every compiled component, which compiles them.

    Call it inside the run's mesh. Host components have already been probed (`probe_callable`).
    """
    findings, episode = [], pair(run.policy.tokenizer, row_shards())
    for reward in run.rewards:
        if not isinstance(reward, HostReward):
            values, valid, _ = runtime.to_host(score_episode(reward, episode))
            findings.append(_finding(reward.name, values[0], valid[0]))
    return findings


def _finding(name: str, values: np.ndarray, valid: np.ndarray) -> Finding:
    good, bad = map(float, values)
    message = f"{good:.3f} for {ANSWER!r}, {bad:.3f} for {BAD_ANSWER!r} to {QUERY!r}"
    check = f"reward {name}"
    if not (math.isfinite(good) and math.isfinite(bad)):
        return Finding("error", check, message, "not finite: its weights or its dtype are wrong")
    if not valid.all():
        remedy = "masked, because the judge's verdict cannot be parsed: use --reward.quality-mode logits"
        return Finding("warning", check, message, remedy)
    if good <= bad:
        remedy = "the correct answer does not score higher: is it the intended model, and was it trained on chats?"
        return Finding("warning", check, message, remedy)
    return Finding("ok", check, message)


def pair(tokenizer: Tokenizer, queries: int) -> Episode:
    """Returns an episode of `queries` copies of one query with both answers, each ended by a stop token."""
    query, stop = tokenizer.encode(QUERY), tokenizer.stop_ids[0]
    answers = [[*tokenizer.encode(text), stop] for text in (ANSWER, BAD_ANSWER)]
    width, shape = max(map(len, answers)), (queries, len(answers))

    def repeated(values: Sequence[Any], dtype: Any) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.array(values, dtype), (queries, *np.shape(values))))

    text = repeated(query, np.int32), jnp.full(queries, len(query), jnp.int32)
    tokens = repeated([ids + [0] * (width - len(ids)) for ids in answers], np.int32)
    lengths, zeros = repeated([*map(len, answers)], np.int32), jnp.zeros((*shape, width))
    done = Completions(tokens, lengths, zeros, zeros, jnp.ones(shape, bool))
    return replicate(Episode(Queries(None, text, jnp.ones(queries, bool)), text, done))
