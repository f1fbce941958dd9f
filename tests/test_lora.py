"""Adapters: what they compute, what they learn, what stays frozen, and what others read of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import child_run
import lsp_jax as lsp
from lsp_jax import cli
from lsp_jax.checkpoint.export import export_adapters, export_run, load_run_adapters, load_run_params
from lsp_jax.checkpoint.provenance import parameters_digest
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.update import gradients
from lsp_jax.model.llama import forward
from lsp_jax.model.lora import PROJECTIONS, LoraConfig, attach_adapters, init_adapters, merged
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.perf.memory import update_bytes
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.training.resume import start_state
from lsp_jax.training.setup import setup
from lsp_jax.training.step import StepContext, train_step
from test_inner_epochs import REFERENCE, fresh, game_of, play
from test_trainer import game_config, game_dir, host_reward, read_lines, same_bits
from tiny import tiny_config, tiny_params

QUICK_COMPILES = True
LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "down_proj"))
STEPS = 3
GREEDY = SamplingConfig(temperature=0)


def learned(params: Any, lora: LoraConfig, seed: int = 5) -> Any:
    """Adapters as after training: neither of a pair is zero."""
    random = np.random.default_rng(seed)
    adapters = init_adapters(params, lora)
    return jax.tree.map(lambda x: x + jnp.asarray(random.normal(0, 0.1, x.shape), jnp.float32), adapters)


def leaf(tree: Any, name: str) -> Any:
    return tree["model"]["layers"][PROJECTIONS[name]][name]


# --- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [LORA.targets, tuple(PROJECTIONS)])
def test_an_adapted_model_computes_what_the_merged_one_does(targets: tuple[str, ...]) -> None:
    config = tiny_config(attention_bias=True, mlp_bias=True)
    base, lora = tiny_params(config), replace(LORA, targets=targets)
    adapters = learned(base, lora)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (3, 11)))
    adapted = forward(attach_adapters(base, adapters, lora), config, tokens)
    np.testing.assert_allclose(adapted, forward(merged(base, adapters, lora), config, tokens), atol=2e-5)
    assert float(jnp.abs(adapted - forward(base, config, tokens)).max()) > 0.1, "or they change nothing"
    for name in targets:
        held = [leaf(base, name)["weight"], *(leaf(adapters, name)[kind] for kind in ("lora_A", "lora_B"))]
        weight, first, second = (np.asarray(x, np.float64) for x in held)
        by_hand = weight + 5 / 3 * first @ second
        np.testing.assert_allclose(leaf(merged(base, adapters, lora), name)["weight"], by_hand, atol=1e-6)


def test_they_begin_as_the_base_exactly() -> None:
    config = tiny_config()
    base, tokens = tiny_params(config), jnp.arange(20).reshape(2, 10)
    fresh_ones = init_adapters(base, LORA)
    np.testing.assert_array_equal(
        forward(attach_adapters(base, fresh_ones, LORA), config, tokens), forward(base, config, tokens)
    )
    for name in LORA.targets:
        first, (layers, inputs, outputs) = leaf(fresh_ones, name)["lora_A"], leaf(base, name)["weight"].shape
        assert first.shape == (layers, inputs, 3) and leaf(fresh_ones, name)["lora_B"].shape == (layers, 3, outputs)
        assert 0.9 / inputs**0.5 < float(jnp.abs(first).max()) <= 1 / inputs**0.5
    other = init_adapters(base, replace(LORA, seed=1))
    assert not np.array_equal(leaf(other, "q_proj")["lora_A"], leaf(fresh_ones, "q_proj")["lora_A"])


def test_decoding_with_adapters_writes_what_the_merged_model_writes(game_model: Path) -> None:
    policy = lsp.load_pretrained(game_model)
    adapters = learned(policy.params, LORA)
    texts = [
        lsp.generate(replace(policy, params=params), ["Say.", "What is 3 + 4?"], GREEDY, stop_at_eos=False)
        for params in (
            attach_adapters(policy.params, adapters, LORA),
            merged(policy.params, adapters, LORA),
            policy.params,
        )
    ]
    assert texts[0] == texts[1] != texts[2]


# --- what they learn -----------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("kl", ["k2", "full"])
def test_their_gradient_is_that_of_the_merged_weights_by_the_chain_rule(kl: Any) -> None:
    """W' = W + s A B: dL/dA = s dL/dW' B^T and dL/dB = s A^T dL/dW', and nothing else has a gradient."""
    loss = LossConfig(beta=0.3, kl_estimator=kl)
    (dense, hyper), (game, _) = game_of(loss=loss), game_of(loss=loss, lora=LORA)
    adapters = learned(REFERENCE, LORA)
    whole = merged(REFERENCE, adapters, LORA)
    batch, references = play(dense, fresh()._replace(params=whole), hyper)
    wanted, _ = gradients(whole, batch, references, hyper, dense.learner)
    found, _ = gradients(adapters, batch, references, hyper, game.learner)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for name in LORA.targets:
        weight, pair = np.asarray(leaf(wanted, name)["weight"], np.float64), leaf(adapters, name)
        first, second = (np.asarray(pair[kind], np.float64) for kind in ("lora_A", "lora_B"))
        by_hand = {
            "lora_A": 5 / 3 * np.einsum("lio,lro->lir", weight, second),
            "lora_B": 5 / 3 * np.einsum("lir,lio->lro", first, weight),
        }
        for kind, expected in by_hand.items():
            np.testing.assert_allclose(leaf(found, name)[kind], expected, atol=1e-5 * np.abs(weight).max(), rtol=1e-3)


def lora_config(model: Path, directory: Path, **changes: Any) -> TrainConfig:
    fields = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 9, "lora": LORA}
    fields |= {"reward": RewardConfig(quality_weight=0.5), "optimizer": OptimizerConfig(learning_rate=0.03)}
    return game_config(model, directory, **fields | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return game_dir(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("adapters") / "run"
    return directory, lsp.train(lora_config(model, directory), rewards=[host_reward()])


@pytest.mark.full
def test_the_frozen_base_plays_judges_and_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    """One set of arrays is policy, reference and judge; updates leave every bit of it."""
    run, params = setup(lora_config(model, tmp_path / "run"), [host_reward()])
    judged = next(reward for reward in run.rewards if reward.name == "quality").params["reference"]
    leaves = [jax.tree.leaves(tree) for tree in (run.reference, params, judged)]
    assert all(one is other is third for one, other, third in zip(*leaves, strict=True))
    before = parameters_digest(run.reference)
    state, _ = start_state(run, params, None, {})  # type: ignore[arg-type]
    held = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert held < 0.5 * sum(leaf.size for leaf in jax.tree.leaves(run.reference)), "moments of adapters alone"
    for _ in range(2):
        played = train_step(run, state, StepContext(1))
        state = played.state
    assert parameters_digest(run.reference) == before
    assert float(played.metrics["solver/kl"]) > 1e-4


@pytest.mark.full
def test_a_run_learns_and_its_checkpoints_hold_adapters_alone(trained: tuple[Path, Any], model: Path) -> None:
    directory, state = trained
    metrics = read_lines(directory / "metrics.jsonl")
    assert metrics[0]["solver/kl"] == metrics[0]["challenger/kl"] == 0, "at first the policy is its reference"
    assert metrics[-1]["solver/kl"] > 1e-4 and metrics[-1]["grad_norm"] > 0
    assert same_bits(load_run_adapters(directory, STEPS), state.params)
    base = lsp.load_pretrained(model).params
    exported = lsp.load_pretrained(directory / "export").params
    assert same_bits(exported, merged(base, state.params, LORA))
    assert same_bits(load_run_params(directory, STEPS), exported)
    assert not same_bits(load_run_params(directory, 1), exported)


@pytest.mark.full
def test_a_second_stage_begins_with_the_merged_policy(trained: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = trained
    config = lora_config(Path(), tmp_path / "second", init_from=str(directory), max_steps=1)
    run, _ = setup(config, [host_reward()])
    assert same_bits(run.reference, load_run_params(directory, STEPS))
    lsp.train(config, rewards=[host_reward()])
    assert same_bits(
        load_run_params(tmp_path / "second", 1),
        merged(run.reference, load_run_adapters(tmp_path / "second", 1), LORA),
    ), "its own base is the first run's policy"
    with pytest.raises(InputError, match="export the merged model"):
        export_adapters(tmp_path / "second", tmp_path / "adapters")


@pytest.mark.full
def test_on_a_mesh_they_play_and_learn_as_on_one_device(model: Path, tmp_path: Path) -> None:
    """Heads and widths over 2, parameters over 4: adapters are spread as their projections are."""
    meshes = {1: MeshConfig(), 8: MeshConfig(fsdp=4, tensor=2)}
    for devices, mesh in meshes.items():
        config = lora_config(model, tmp_path / str(devices), mesh=mesh, max_steps=2, save_steps=2)
        env = child_run.environment(devices=devices, quick=True)
        ended = child_run.run(config, env=env)
        assert ended.returncode == 0, ended.stderr[-3000:]
    one, spread = (read_lines(tmp_path / str(devices) / "metrics.jsonl") for devices in meshes)
    for name in ("loss", "grad_norm", "solver/reward", "solver/entropy"):
        assert spread[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-5), name
    left, right = (load_run_adapters(tmp_path / str(devices), 2) for devices in meshes)
    assert jax.tree.map(jnp.shape, left) == jax.tree.map(jnp.shape, right)


# --- what others read of them --------------------------------------------------------------------------------------


@pytest.mark.full
def test_peft_and_transformers_compute_the_same_logits(
    trained: tuple[Path, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    directory, _ = trained
    assert cli.main(["export", str(directory), str(tmp_path / "adapters"), "--adapters"]) == 0
    assert "the adapters of" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert "library_name: peft" in card and f"# Adapters for {model.name}" in card
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (str(model), None)
    ids = np.random.default_rng(1).integers(3, 200, (2, 9))
    ours = lsp.load_pretrained(directory / "export")
    expected = np.asarray(lsp.forward(ours.params, ours.config, jnp.asarray(ids)))
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    plain = base(torch.tensor(ids)).logits.detach().numpy()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name} == set(LORA.targets)
    theirs = adapted(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-4)
    assert np.abs(theirs - plain).max() > 1e-2, "or nothing was loaded"
    exported = transformers.AutoModelForCausalLM.from_pretrained(directory / "export")
    np.testing.assert_allclose(exported(torch.tensor(ids)).logits.detach().numpy(), expected, atol=1e-4)


@pytest.mark.full
def test_exports_are_refused_where_they_would_be_wrong(trained: tuple[Path, Any], model: Path, tmp_path: Path) -> None:
    directory, _ = trained
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"notes\.txt"):
        export_adapters(directory, tmp_path / "mine")
    assert export_adapters(directory, tmp_path / "a", 1) == 1 and export_adapters(directory, tmp_path / "a") == STEPS
    (tmp_path / "a" / "README.md").write_text("mine now")
    with pytest.raises(InputError, match=r"README\.md"):
        export_adapters(directory, tmp_path / "a")

    moved = tmp_path / "moved"
    run = lora_config(model, moved, max_steps=1)
    lsp.train(run, rewards=[host_reward()])
    settings = json.loads((moved / "config.json").read_text())
    other = game_dir(tmp_path / "other", seed=9)
    (moved / "config.json").write_text(json.dumps(settings | {"model": str(other)}))
    with pytest.raises(InputError, match="not those that the adapters"):
        export_run(moved, tmp_path / "b")
    (moved / "config.json").write_text(json.dumps(settings | {"lora": {**settings["lora"], "rank": 0}}))
    with pytest.raises(InputError, match="trained all parameters"):
        export_adapters(moved, tmp_path / "c")
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_settings_that_cannot_be_used_are_named(model: Path, tmp_path: Path) -> None:
    bad = {
        "lora.rank": [replace(LORA, rank=-1), replace(LORA, rank=33)],
        "lora.alpha": [replace(LORA, alpha=0.0), replace(LORA, alpha=float("nan"))],
        "lora.targets": [replace(LORA, targets=()), replace(LORA, targets=("lm_head",))],
        "lora.seed": [replace(LORA, seed=-1)],
    }
    for field, settings in bad.items():
        for lora in settings:
            with pytest.raises(InputError) as error:
                setup(lora_config(model, tmp_path / "run", lora=lora), [host_reward()])
            assert error.value.field == field
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_memory_knows_them(model: Path, tmp_path: Path) -> None:
    config = lora_config(model, tmp_path / "run")
    wide = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    game, adapted = (
        replace(spec, learner=replace(spec.learner, model=wide)) for spec, _ in (game_of(), game_of(lora=LORA))
    )
    full = update_bytes(game, replace(config, lora=LoraConfig()), None, None)
    few = update_bytes(adapted, config, None, None)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny_params(game.model)))
    assert full - few > 0.9 * 24 * parameters, "master copy, moments, gradients, the copy computed with"
