"""`lsp-jax plan`: bad names, the tiny model planned from end to end, its whole iteration compiled for TPUs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lsp_jax import cli, presets
from lsp_jax.algorithm.spec import hyperparameters
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.model import llama
from lsp_jax.model.known_models import SHAPES, shape_of
from lsp_jax.model.sharding import MeshConfig, make_mesh, use_mesh
from lsp_jax.perf import hlo, placeholders
from lsp_jax.perf.aot import Phase, Planner
from lsp_jax.perf.chips import CHIPS, GIB, Topology, open_topology
from lsp_jax.perf.cost import Work, count
from lsp_jax.perf.plan import Plan, bound, plan, table
from lsp_jax.perf.planned_run import shapes_of_data_queries
from lsp_jax.play.prompt_data import DataConfig, widest
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reward.base import DeviceReward
from lsp_jax.reward.quality import logits_scores
from refusal import Refused
from specs import composed_iteration
from tiny import tiny_config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan (libtpu)")

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.2358),  # parameters as the models' cards and safetensors indices count them
        ("llama-3.2-3b", 3.2127),
        ("llama-3.1-8b", 8.0303),
        ("llama-3-8b", 8.0303),
        ("llama-3.1-70b", 70.5537),
        ("smollm2-135m", 0.13452),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, billions):
    count = sum(leaf.size for leaf in jax.tree.leaves(llama.params_shape(SHAPES[name])))
    assert count / 1e9 == pytest.approx(billions, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("Skywork/Skywork-Reward-V2-Llama-3.2-3B", "llama-3.2-3b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("./models/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)
def test_a_hub_id_that_holds_a_name_has_its_shape(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a model of that path may lie in the checkout, and would be read
    assert shape_of(name) == SHAPES[known]


def test_a_planned_game_is_the_configured_one():
    """All that the real one takes from the configuration as it is: with adapters other programs are compiled."""
    for preset in ("quickstart", "lora_laptop"):
        config = presets.get(preset)
        config = replace(config, memory=replace(config.memory, size=512))
        game = placeholders.game(config, SHAPES["smollm2-135m"])
        assert game.learner.loss == config.loss.spec and game.learner.optimizer == config.optimizer.spec
        assert game.learner.lora == config.lora and game.memory_size == 512
        play = config.play
        assert (game.num_queries, game.num_generations) == (play.num_queries, play.num_generations)
        assert game.solver == replace(
            game.challenger, sampling=config.sampling, max_new_tokens=play.max_completion_length
        )
        assert (game.challenger.sampling, game.challenger.max_new_tokens, game.challenger.chunk) == (
            config.challenger_sampling,
            play.max_query_length,
            play.decode_chunk,
        )


def test_every_preset_has_shapes():
    for preset in presets.PRESETS.values():
        config = preset()
        assert shape_of(config.model)
        if config.reward.preference_model:
            assert shape_of(config.reward.preference_model)


def test_a_directory_with_a_config_has_its_shape(tmp_path: Path):
    config = tiny_config(head_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert shape_of(str(tmp_path)) == config


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no topology": ([], ("topology = None", "v5e:4x4")),
    "chip": (["--topology", "v9z:4x4"], ("topology = 'v9z:4x4'", "v5e:4x4", "h100:8")),
    "no grid": (["--topology", "v5e"], ("topology = 'v5e'",)),
    "model": (["--topology", "v5e:2x2", "--model", "gpt-9"], ("model = 'gpt-9'", "llama-3.2-3b")),
    "reward model": (
        ["--topology", "v5e:2x2", "--reward.preference-model", "other/Reward-9B"],
        ("reward.preference_model = 'other/Reward-9B'", "config.json"),
    ),
    "mesh": (["--topology", "v5e:2x2", "--mesh.fsdp", "3"], ("mesh", "do not divide 4 devices")),
    "preset": (["--topology", "v5e:2x2", "--preset", "nosuch"], ("preset = 'nosuch'", "paper_lsp")),
    "output": (["--topology", "v5e:2x2", "--output", "/nosuch/dir/plan.json"], ("output", "a directory that exists")),
}


@needs_libtpu
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_planned_is_one_line(case: str, refused: Refused):
    arguments, words = WRONG[case]
    refused(["plan", *arguments], *words)


@needs_libtpu
def test_a_shape_that_no_slice_has_is_one_line(refused: Refused):
    refused(["plan", "--topology", "v5e:3x5"], "topology = 'v5e:3x5'", "is no machine that its compiler knows")


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "plan"), ("h100:8", "plan-gpu")])
def test_a_missing_compiler_names_its_extra(topology, extra, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(["plan", "--topology", topology], f"topology = '{topology}'", f"pip install 'lsp-jax[{extra}]'")


# --- arithmetic ------------------------------------------------------------------------------------------------------


def phase(**fields: Any) -> Phase:
    zeros = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "held"), 0)
    return Phase(**{"name": "update", **zeros, "work": Work(), "times": 1, "compile_seconds": 0.0, **fields})


def test_the_bound_is_the_longest_of_three_times():
    chip = CHIPS["v5e"]  # 197 TFLOP/s, 819 GB/s, 200 GB/s into the chip
    assert bound(phase(work=Work(197e12, 819e8, {"all-gather": 2e9})), chip) == ("compute", 1.0)
    assert bound(phase(work=Work(197e10, 819e9, {"all-gather": 2e9})), chip) == ("memory", 1.0)
    assert bound(phase(work=Work(197e10, 819e7, {"all-gather": 1e11, "all-reduce": 1e11})), chip) == ("network", 1.0)


def test_the_peak_counts_what_is_held_and_not_twice_what_is_aliased():
    assert phase(arguments=10, outputs=7, aliased=6, temporaries=5, held=3).peak == 19


# --- compiled for TPUs ----------------------------------------------------------------------------------------------


def planned_model(directory: Path) -> Path:
    """A tiny Llama whose heads are as wide as a TPU's lanes, by its config alone."""
    directory.mkdir()
    config = tiny_config(hidden_size=256, intermediate_size=512, head_dim=128)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return directory


def small(model: Path) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        play=PlayConfig(num_queries=4, num_generations=2, max_query_length=8, max_completion_length=16),
        reward=RewardConfig(preference_model=str(model), quality_weight=0.5, judge_rows=4),
        optimizer=OptimizerConfig(micro_batch_size=2),
    )


@needs_libtpu
@pytest.mark.full
def test_the_command_plans_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, output = planned_model(tmp_path / "model"), tmp_path / "plan.json"
    config = small(model)
    arguments = ["plan", "--topology", "v5e:2x2", "--preset", "recommended_lsp_1b", "--output", output]
    arguments += ["--model", model, "--reward.preference-model", model, "--optimizer.micro-batch-size", 2]
    for name in ("num_queries", "num_generations", "max_query_length", "max_completion_length"):
        arguments += [f"--play.{name.replace('_', '-')}", getattr(config.play, name)]
    assert cli.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert "fits: " in captured.out and "| update |" in captured.out and "compiled in" in captured.err

    made = json.loads(output.read_text())
    names = ["rubric", "start", "weight_sync", "challenge", "solve", "preference reward", "quality reward"]
    names += ["reference", "advantages", "update"]
    assert [entry["name"] for entry in made["phases"] if ":" not in entry["name"]] == names
    # the small ones: keys, rows of both roles, queries and groups read out of them, novelty, counters
    assert made["fits"] is True and made["topology"] == "v5e:2x2" and made["programs"] == len(names) + 9
    assert made["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert set(made["resident"]) == {"state", "reference", "reward model", "rubric"}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(llama.params_shape(shape_of(str(model)))))
    memory = 4 * (MemoryConfig().size + 1) * shape_of(str(model)).hidden_size  # of queries, and its centre
    assert made["checkpoint"] == pytest.approx(3 * 4 * parameters + memory, abs=64)  # float32, two moments, counters
    assert parameters * 12 / 4 <= made["resident"]["state"] - memory / 4 <= 1.02 * parameters * 12 / 4
    assert made["sizes"]["generated_tokens"] == 4 * 8 + 4 * 2 * 16
    for entry in made["phases"]:
        assert entry["failure"] == "" and entry["work"]["unknown_loops"] == 0
        assert entry["bound"] in ("compute", "memory", "network")
        sizes = [entry[name] for name in ("arguments", "outputs", "aliased", "temporaries", "held", "peak")]
        assert all(isinstance(size, int) and size >= 0 for size in sizes)
    times = {entry["name"]: entry["times"] for entry in made["phases"]}
    assert times["start"] == 0 and times["update"] == 1
    total = sum(entry["seconds"] * entry["times"] for entry in made["phases"])
    assert made["seconds"] == pytest.approx(total) and made["seconds"] > 0
    assert made["tokens_per_second"] == pytest.approx(made["sizes"]["generated_tokens"] / total)


def test_a_run_on_data_is_planned_with_its_longest_prompts(monkeypatch: pytest.MonkeyPatch):
    """Both where its queries are made and where rows of a micro-batch are counted."""
    config = presets.get("paper_grpo")
    config = replace(config, data=DataConfig(source="prompts.jsonl", max_prompt_length=1500))
    seen = []

    def stopped(*arguments: Any) -> None:
        seen.append(shapes_of_data_queries(arguments[1], widest(arguments[0].data)).text[0].shape)
        raise InputError("plan", None, "far enough")

    monkeypatch.setattr("lsp_jax.perf.plan.compile_run", stopped)
    monkeypatch.setattr(
        "lsp_jax.perf.plan.with_micro_batch_size", lambda *arguments: seen.append(arguments[-1]) or arguments[0]
    )
    with pytest.raises(InputError, match="far enough"):
        plan(config, Topology("v5e:1x1", CHIPS["v5e"], tuple(jax.devices()[:1])))
    assert seen == [2048, (config.play.num_queries, 2048)]


@needs_libtpu
@pytest.mark.full
def test_a_whole_iteration_compiles_as_one_program_for_tpus(tmp_path: Path):
    config = small(planned_model(tmp_path / "model"))
    model, machine = shape_of(config.model), open_topology("v5e:2x2")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), model, machine.devices)
    assert mesh is not None
    game, judge = placeholders.game(config, model), placeholders.judge(config, model)
    planner = Planner(machine, mesh, lambda line: None)
    shapes = llama.params_shape(model)
    start = jax.eval_shape(game.init_train_state, shapes)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    state, reference = planner.put(start, "train"), planner.put(frozen, "train")
    token_classes = planner.put(jax.ShapeDtypeStruct((model.vocab_size,), jnp.uint8))
    key = planner.put(jax.eval_shape(jax.random.key, 0))
    rubric = jax.eval_shape(
        lambda *args: llama.extend(args[0], model, *args[1:])[1], frozen, *placeholders.rubric(judge)
    )
    reward = DeviceReward("quality", "quality", 1.0, partial(logits_scores, judge=judge))
    judged = {"reference": reference, "rubric": planner.put(rubric), "token_classes": token_classes}
    composed, scalars = composed_iteration([reward], game), hyperparameters(config)

    def iteration(state: Any, reference: Any, judged: Any, token_classes: Any, key: Any) -> Any:
        scored = [judged | {"tags": placeholders.NO_TAGS}]
        return composed(state, reference, scored, token_classes, key, scalars)

    with use_mesh(mesh):
        lowered = jax.jit(iteration, donate_argnums=0).lower(state, reference, judged, token_classes, key)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text and "splash_mha_dq" in text
    work = count(hlo.parse(text), len(machine.devices))
    assert work.flops > 0 and work.unknown_loops == 0
    assert work.collectives["all-reduce"] > 0  # partial sums over `tensor`
    after = compiled.output_shardings[0]
    assert jax.tree.leaves(after.params) == [leaf.sharding for leaf in jax.tree.leaves(state.params)]
    memory = compiled.memory_analysis()
    assert 0 < memory.alias_size_in_bytes <= memory.argument_size_in_bytes  # the state is donated


def test_a_plan_that_does_not_fit_says_what_to_change():
    made = Plan(
        model="m",
        reward_model="",
        topology="v5e:2x2",
        chip=replace(CHIPS["v5e"], memory=1 * GIB),
        mesh={},
        sizes={"generated_tokens": 8},
        resident={"state": 100},
        phases=(phase(arguments=GIB, temporaries=GIB),),
        checkpoint=0,
        verdict="",
        versions={},
    )
    assert not made.fits
    assert made.peak == 2 * GIB and "| update |" in table(made)


def test_plan_raises_for_a_model_that_it_does_not_know():
    with pytest.raises(InputError, match="gpt-9"):
        plan(TrainConfig(model="gpt-9"), Topology("v5e:2x2", CHIPS["v5e"], []))


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:8x8", "v5e:16x16", "v5p:4x4x4"])
def test_the_default_mesh_can_be_laid_on_the_torus(name: str):
    mesh = make_mesh(MeshConfig(), shape_of("llama-3.2-3b"), open_topology(name).devices)
    assert mesh is not None and mesh.shape["tensor"] == 4 and mesh.shape["fsdp"] == 16


@needs_libtpu
def test_over_two_slices_data_crosses_the_network_between_them():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=-1), None, devices)
    assert mesh is not None and dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert [{device.slice_index for device in copy.ravel()} for copy in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match=r"mesh\.data = 1: must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(fsdp=8), None, devices)
