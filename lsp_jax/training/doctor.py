"""One pass over a run before its first long compilation: what goes wrong without a word, each finding with what to do.

What cannot be used at all has been refused by `setup`. Training makes this pass too and ends at an error;
`lsp-jax doctor` makes it alone, and has a pair of answers scored as well (`training/doctor.py`).
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
from lsp_jax.learn.losses import kl_terms
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
    """One line of the pass."""

    level: Level
    check: str
    """The subject of the check."""
    said: str
    """The finding."""
    remedy: str = ""
    """The remedy; empty where all is well."""

    def __str__(self) -> str:
        line = f"{self.level:7}  {self.check}: {self.said}"
        return f"{line}: {self.remedy}" if self.remedy else line


def examine(run: Run, params: Params) -> list[Finding]:
    """Everything that can be looked at in a moment; changes nothing, and all processes may call it. `params` are those
    that the run starts from."""
    tokenizer = run.policy.tokenizer
    return [
        _vocabulary(run, tokenizer),
        _stop_ids(run, tokenizer),
        *_prompts(run, tokenizer),
        _kl_gradient(run),
        _mesh(run),
        _memory(run),
        _disk(run, params),
    ]


# --- tokens and prompts ----------------------------------------------------------------------------------------------


def _vocabulary(run: Run, tokenizer: Tokenizer) -> Finding:
    """A tokenizer larger than the model has been refused; padding may be any id, since masks come from lengths."""
    rows, known = run.policy.config.vocab_size, tokenizer.vocab_size
    beyond = f", {rows - known} rows of the embedding have no token" if rows > known else ""
    pad = f"padding {_shown(tokenizer, [tokenizer.pad_id])} ({tokenizer.pad_id})"
    return Finding("ok", "vocabulary", f"{known} tokens, model {rows}{beyond}; {pad}")


def _stop_ids(run: Run, tokenizer: Tokenizer) -> Finding:
    """The token that ends an answer in the chat template must end a completion too."""
    rows, stops = run.policy.config.vocab_size, tokenizer.stop_ids
    outside = [token for token in stops if not 0 <= token < rows]
    if outside:
        remedy = f"outside the model's {rows} ids: correct eos_token_id in generation_config.json"
        return Finding("error", "stop ids", str(outside[0]), remedy)
    shown = ", ".join(f"{_shown(tokenizer, [token])} ({token})" for token in stops)
    messages = [{"role": "user", "content": SLOT}, {"role": "assistant", "content": SLOT}]
    try:
        tail = template_pieces(tokenizer, messages, add_generation_prompt=False)[-1]
    except InputError:  # a template for one turn: enough to train the Solver on data
        return Finding("ok", "stop ids", f"{shown}; the chat template has no place for an answer to compare with")
    end = next((token for token in tail if token in tokenizer.special_ids or token in stops), None)
    if end in stops:
        return Finding("ok", "stop ids", shown)
    if end is None:
        remedy = "answers end only where the model writes one of them by itself: watch the truncated fractions"
        return Finding("warning", "stop ids", f"{shown}; the chat template ends an answer with no such token", remedy)
    remedy = f"add {end} to eos_token_id in generation_config.json, or answers run on to their longest"
    said = f"{shown}; the chat template ends an answer with {_shown(tokenizer, [end])} ({end})"
    return Finding("warning", "stop ids", said, remedy)


def _prompts(run: Run, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Compares each role's prompt with the chat template's own ids, and decodes it back to text."""
    prompts, reward = run.game.prompts, run.config.reward
    if run.data is None:
        asked = prompts.challenger_ids[: len(prompts.challenger_ids) - len(prompts.query_prefix_ids)]
        own = tokenizer.chat_ids(run.config.prompts.challenger)
        yield _prompt(tokenizer, "Challenger's prompt", list(asked), own, [run.config.prompts.challenger])
    query, answer = tokenizer.encode(QUERY), tokenizer.encode(ANSWER)
    spliced = [*prompts.solver.prefix_ids, *query, *prompts.solver.suffix_ids]
    yield _prompt(tokenizer, "Solver's prompt", spliced, tokenizer.chat_ids(QUERY), [QUERY])
    if reward.quality_weight:
        criteria = load_criteria(reward.rubric)
        make = judge_template if reward.quality_mode == "logits" else text_judge_template
        judge = make(tokenizer, criteria)
        spliced = [*judge.rubric_ids, *query, *judge.middle_ids, *answer, *judge.tail_ids]
        own = tokenizer.chat_ids(judge_messages(criteria, reward.quality_mode, QUERY, ANSWER))
        yield _prompt(tokenizer, "judge's prompt", spliced, own, [QUERY, ANSWER])


def _prompt(tokenizer: Tokenizer, name: str, ids: list[int], own: list[int], texts: list[str]) -> Finding:
    """`ids` are what the role is given, `own` the chat template's; `texts` must come back out of them.

    SentencePiece opens a text alone with a space of its own; a Challenger writes its query without, so no matter.
    """
    bos = tokenizer.bos_id
    if bos is not None and own[:2] == [bos, bos]:
        remedy = "the chat template writes it twice: take one out of chat_template"
        return Finding("error", name, f"begins with {_shown(tokenizer, [bos, bos])}", remedy)
    decoded = tokenizer.decode(own)
    lost = [text for text in texts if text.strip() not in decoded]
    if lost:
        remedy = "the chat template changes what it is given: the role is not asked what is configured"
        return Finding("warning", name, f"{lost[0]!r} does not come back out of its ids", remedy)
    if tokenizer.decode(ids).replace(" ", "") != decoded.replace(" ", ""):
        at = next((n for n, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
        there, here = (_shown(tokenizer, row[at : at + 4]) for row in (own, ids))
        remedy = "the game does not show what the chat template would: please report it with the template"
        return Finding("error", name, f"at token {at} the template has {there}, the game {here}", remedy)
    same = "as the chat template's" if ids == own else "that read as the chat template's, cut otherwise"
    return Finding("ok", name, f"{len(ids)} tokens {same}, ending {_shown(tokenizer, ids[-6:])}")


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    return repr(printable(tokenizer.decode(ids), 60))


# --- the objective and the machine -----------------------------------------------------------------------------------


def kl_pull(estimator: str) -> float:
    """How much a small step down the KL term's expected gradient takes off the exact KL to the reference, over what
    the exact gradient takes: 1 for the exact one, 0 for none, below 0 away from the reference. (On seven tokens.)"""
    reference = jax.nn.log_softmax(jnp.sin(2.0 * jnp.arange(7.0)))

    def exact(logits: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(own) * (own - reference))

    def expected(logits: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(own))
        return jnp.sum(drawn * kl_terms(own, reference, estimator, exact(logits)))

    @jax.jit
    def pull(logits: jax.Array) -> jax.Array:
        down, best = jax.grad(expected)(logits), jax.grad(exact)(logits)
        return jnp.sum(down * best) / jnp.sum(best * best)

    return float(runtime.to_host(pull(jnp.linspace(-1.0, 1.0, 7))))


def _kl_gradient(run: Run) -> Finding:
    loss = run.config.loss
    if not loss.beta:
        return Finding("ok", "KL", "no KL to the reference (loss.beta 0)")
    pull = kl_pull(loss.kl_estimator)
    said = f"{loss.kl_estimator}, its expected gradient takes {pull:.2f} of the exact one's way to the reference"
    if pull > 0.05:
        return Finding("ok", "KL", said)
    return Finding("warning", "KL", said, "nothing holds the policy there: take --loss.kl-estimator k2, k3 or full")


def _mesh(run: Run) -> Finding:
    """Heads against the mesh: what does not divide has been refused."""
    model, devices = run.policy.config, jax.device_count()
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} of keys and values"
    if run.mesh is None:
        return Finding("ok", "mesh", f"one device ({jax.devices()[0].device_kind}); {heads}")
    sizes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    rows = run.config.play.num_queries * run.config.play.num_generations
    shards = run.mesh.size // run.mesh.shape["tensor"]
    if rows % shards:
        remedy = f"they are not spread over all of them: make num_queries x num_generations a multiple of {shards}"
        return Finding("warning", "mesh", f"{sizes}; {rows} answers for {shards} groups of devices", remedy)
    return Finding("ok", "mesh", f"{sizes} of {devices} devices; {heads}; {rows // shards} answers a group")


def _memory(run: Run) -> Finding:
    """The estimate of the update against what a device, or on CPUs the machine, can hold."""
    scorer = run.reward_model and run.reward_model.config
    needed = update_bytes(run.game, run.config, scorer, run.mesh, run.data.width if run.data else 0)
    limit, place = device_memory(), "a device"
    if limit is None:
        limit, place = host_memory(), "this machine"
        needed *= 1 if run.mesh is None else len(run.mesh.local_devices)
    said = f"about {needed / GIB:.2f} GiB for the update"
    if limit is None:
        return Finding("ok", "memory", f"{said}; how much there is, nobody says")
    said = f"{said} of {limit / GIB:.2f} on {place}"
    if needed <= USED * limit:
        return Finding("ok", "memory", said)
    remedy = (
        "lower --optimizer.micro-batch-size and --optimizer.logprob-chunk, take --optimizer.moment-dtype bfloat16 or "
        "--park-frozen, or more devices (lsp-jax plan says for machines that are not at hand)"
    )
    return Finding("warning", "memory", said, remedy)


def _disk(run: Run, params: Params) -> Finding:
    """Room for the checkpoints: a new one is written before the oldest goes, and the export at the end."""
    state = jax.eval_shape(run.game.init_train_state, params)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    whole = run.reference if run.game.learner.lora.rank else state.params  # adapters are merged
    export = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
    folder = run.directory / CHECKPOINTS
    existing = existing_part(run.directory)
    try:
        there = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding("warning", "disk", f"{existing}: {error.strerror}", "what is free there cannot be told")
    if max(there, default=0) >= run.config.max_steps:
        one = 0  # nothing is left to save but the export
    kept = run.config.save_total_limit + 1 + bool(run.config.metric_for_best_model)
    kept += 2 * run.config.health.rolls_back
    wanted = max(kept - len(there), 1) * one + export
    said = f"{one / GIB:.2f} GiB a checkpoint, {wanted / GIB:.2f} wanted, {free / GIB:.2f} free in {existing}"
    if free >= wanted:
        return Finding("ok", "disk", said)
    level: Level = "error" if free < one and run.config.save_errors == "stop" else "warning"
    return Finding(level, "disk", said, "free some, lower --save-total-limit, or give another --output-dir")


BAD_ANSWER = "no no no no"


def examine_all(config: TrainConfig) -> list[Finding]:
    """The whole pass over the run `config`; its model is loaded, nothing is trained and nothing written."""
    run, params = setup(config)
    try:
        with use_mesh(run.mesh):
            return [*examine(run, params), *examine_rewards(run)]
    finally:
        run.workers.close()


def examine_rewards(run: Run) -> list[Finding]:
    """Has every compiled component score a right and a senseless answer; compiles what they need for that. Call it
    inside the run's mesh.

    What scores on the host has been asked already (`probe_callable`).
    """
    findings, episode = [], pair(run.policy.tokenizer, row_shards())
    for reward in run.rewards:
        if not isinstance(reward, HostReward):
            values, valid, _ = runtime.to_host(score_episode(reward, episode))
            findings.append(_finding(reward.name, values[0], valid[0]))
    return findings


def _finding(name: str, values: np.ndarray, valid: np.ndarray) -> Finding:
    good, bad = map(float, values)
    said = f"{good:.3f} for {ANSWER!r}, {bad:.3f} for {BAD_ANSWER!r} to {QUERY!r}"
    check = f"reward {name}"
    if not (math.isfinite(good) and math.isfinite(bad)):
        return Finding("error", check, said, "not a number: its weights or its dtype are wrong")
    if not valid.all():
        remedy = "masked where it cannot be read: a judge that keeps to no form, use --reward.quality-mode logits"
        return Finding("warning", check, said, remedy)
    if good <= bad:
        remedy = "it does not tell them apart: is it the model that was meant, and was it trained on chats?"
        return Finding("warning", check, said, remedy)
    return Finding("ok", check, said)


def pair(tokenizer: Tokenizer, queries: int) -> Episode:
    """An episode of `queries` times the same query with both answers, each of which stopped."""
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
