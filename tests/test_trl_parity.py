"""GRPO's advantages, loss and gradient against TRL's own GRPOTrainer: its code, run on the same model and tokens.

`make test-peers` runs this in an environment of its own, with TRL; elsewhere it is skipped. Nothing of TRL is copied or
replaced: a rollout function hands it the completions and the sampler's log-probabilities, and it computes rewards,
advantages, old and reference log-probabilities, importance weights, loss and gradient itself.

TRL's settings that match ours, with `importance_sampling_level="token"`:

| ours | TRL |
|---|---|
| loss_type sequence, token_mean, constant_length | luspo; dapo (bnpo in one micro-batch); dr_grpo |
| kl_estimator k3, k2; beta | use_bias_correction_kl False, True (TRL's default); beta |
| scale_rewards | scale_rewards |
| clip_epsilon, clip_epsilon_high, num_iterations | epsilon, epsilon_high, num_iterations |
| importance_cap | use_vllm, vllm_importance_sampling_mode token_truncate, vllm_importance_sampling_clip_max |
| sampling.temperature | temperature |

TRL's corrected KL is k3 times the ratio: its gradient is that of our k2 with its stopped ratio, its value is not.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsp_jax.learn.advantages import GroupRewards, advantages
from lsp_jax.learn.batch import LearnBatch, Sampled, make_rows
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.spec import LearnerSpec, LossSpec
from lsp_jax.learn.update import gradients, reference_logprobs, with_old_logprobs
from lsp_jax.model.weights import load_params
from specs import hyper, learner_spec
from tiny import EOS, VOCABULARY, tiny_config, tiny_dir

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")

CONFIG = tiny_config(tie_word_embeddings=False)
OPT = OptimizerConfig(micro_batch_size=4, logprob_chunk=16, remat="none")
N, G, LONGEST, TEMPERATURE = 3, 4, 9, 0.7
LENGTHS = np.array([5, 7, 1, 3, 2, 6, 4, 7, 3, 1, 5, 2])
PLAYED, MOVED, REFERENCE = 0, 1, 2  # seeds of parameters


@dataclass(frozen=True)
class Case:
    """One setting, ours and TRL's."""

    loss: LossConfig
    theirs: dict[str, Any] = field(default_factory=dict)
    moved: bool = False
    """The gradient is taken after a first step moved the parameters."""


def loss(**changes: Any) -> LossConfig:
    return LossConfig(**{"beta": 0.2, "kl_estimator": "k3", **changes})


MOVED_STEP = {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3}
OUR_STEP = {"num_iterations": 2, "clip_epsilon": 0.1, "clip_epsilon_high": 0.3}
CAPPED = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.3}
CASES = {
    "sequence": Case(loss(), {"loss_type": "luspo", "scale_rewards": "none"}),
    "k2": Case(
        loss(kl_estimator="k2"), {"loss_type": "luspo", "scale_rewards": "none", "use_bias_correction_kl": True}
    ),
    "k2-second-step": Case(
        loss(kl_estimator="k2", **OUR_STEP),
        {"loss_type": "luspo", "scale_rewards": "none", "use_bias_correction_kl": True, **MOVED_STEP},
        True,
    ),
    "no-kl": Case(loss(beta=0.0), {"beta": 0.0, "loss_type": "luspo", "scale_rewards": "none"}),
    "token-mean": Case(loss(loss_type="token_mean"), {"loss_type": "dapo", "scale_rewards": "none"}),
    "token-mean-bnpo": Case(loss(loss_type="token_mean"), {"loss_type": "bnpo", "scale_rewards": "none"}),
    "constant-length": Case(loss(loss_type="constant_length"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "group-std": Case(loss(loss_type="token_mean", scale_rewards="group"), {"scale_rewards": "group"}),
    "batch-std": Case(loss(loss_type="token_mean", scale_rewards="batch"), {"scale_rewards": "batch"}),
    "second-step": Case(loss(**OUR_STEP), {"loss_type": "luspo", "scale_rewards": "none", **MOVED_STEP}, True),
    "second-step-token-mean": Case(
        loss(loss_type="token_mean", scale_rewards="group", **OUR_STEP), {"scale_rewards": "group", **MOVED_STEP}, True
    ),
    "second-step-constant-length": Case(
        loss(loss_type="constant_length", scale_rewards="batch", **OUR_STEP),
        {"loss_type": "dr_grpo", "scale_rewards": "batch", **MOVED_STEP},
        True,
    ),
    "importance": Case(
        loss(loss_type="token_mean", importance_cap=1.3), {"loss_type": "dapo", "scale_rewards": "none", **CAPPED}
    ),
    "importance-second-step": Case(
        loss(importance_cap=1.3, **OUR_STEP),
        {"loss_type": "luspo", "scale_rewards": "none", **CAPPED, **MOVED_STEP},
        True,
    ),
}


class Play:
    """Prompts, completions, the sampler's log-probabilities and rewards; ragged lists, the same for both sides."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.prompts = [rng.integers(3, VOCABULARY, size).tolist() for size in (2, 5, 3) for _ in range(G)]
        self.completions = [[*rng.integers(3, VOCABULARY, size - 1).tolist(), EOS] for size in LENGTHS]
        self.noise = 0.5 * rng.standard_normal((N * G, LENGTHS.max()))
        self.logprobs: list[list[float]] = [[0.0] * int(size) for size in LENGTHS]  # set once the policy is known
        self.rewards = rng.normal(0.5, 2.0, N * G)


def parameters(directories: dict[int, Path], seed: int) -> Any:
    return load_params(directories[seed], CONFIG, "float32")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The policy that played, the policy a step later, the reference: tiny Llamas, the latter two near the first."""
    root = tmp_path_factory.mktemp("models")
    made = {seed: tiny_dir(root / str(seed), seed, tie_word_embeddings=False) for seed in (PLAYED, MOVED, REFERENCE)}
    safetensors = pytest.importorskip("safetensors.torch")
    played = safetensors.load_file(made[PLAYED] / "model.safetensors")
    # a reference near enough that exp(-d) is moderate, and far enough that the loss is not a difference of equal terms
    for seed, share in ((MOVED, 0.03), (REFERENCE, 0.06)):
        file = made[seed] / "model.safetensors"
        other = safetensors.load_file(file)
        near = {name: weight + share * (other[name] - weight) for name, weight in played.items()}
        safetensors.save_file(near, file, metadata={"format": "pt"})
    return made


def make_trainer(play: Play, case: Case, directories: dict[int, Path], output: Path, rewards: list[Any]) -> Any:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": play.prompts, "completion_ids": play.completions, "logprobs": play.logprobs}

    def reward(completions: list[str], **_: Any) -> list[Any]:
        assert len(completions) == N * G
        return rewards

    settings = {"beta": 0.2, "loss_type": "dapo", "use_bias_correction_kl": False, **case.theirs}
    args = trl.GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=N * G,
        num_generations=G,
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        importance_sampling_level="token",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"},
        **settings,
    )
    rows = datasets.Dataset.from_list([{"prompt": f"question {i}"} for i in range(N)])
    trainer = trl.GRPOTrainer(str(directories[PLAYED]), reward, args, train_dataset=rows, rollout_func=rollout)
    trainer.current_gradient_accumulation_steps = 1
    if case.loss.beta:
        trainer.ref_model.load_state_dict(state_dict(directories[REFERENCE]))
    if case.loss.importance_cap:
        # the weights' code without a vLLM server: the rollout function has given the sampler's log-probabilities
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.model.train()
    return trainer


def state_dict(directory: Path) -> Any:
    return pytest.importorskip("safetensors.torch").load_file(directory / "model.safetensors")


def inputs_of(trainer: Any) -> dict[str, Any]:
    """What TRL makes of the play: advantages, log-probabilities, importance weights."""
    return trainer._generate_and_score_completions([{"prompt": f"question {i // G}"} for i in range(N * G)])


def their_gradient(trainer: Any, inputs: Any, directories: dict[int, Path], case: Case, output: Path) -> Any:
    """TRL's loss, and its gradient as our parameters (written and read as a model's weights)."""
    if case.moved:
        trainer.model.load_state_dict(state_dict(directories[MOVED]))
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    grads = {name: p.grad.contiguous() for name, p in trainer.model.named_parameters()}
    output.mkdir()
    shutil.copy(directories[PLAYED] / "config.json", output)
    pytest.importorskip("safetensors.torch").save_file(grads, output / "model.safetensors", metadata={"format": "pt"})
    return value.item(), load_params(output, CONFIG, "float32")


def padded(lists: list[list[Any]], dtype: Any, width: int) -> jax.Array:
    return jnp.asarray([[*row, *[0] * (width - len(row))] for row in lists], dtype)


def our_advantages(task: jax.Array, valid: jax.Array, spec: LossSpec) -> jax.Array:
    """The Solver's [N, G], from one reward."""
    rewards = GroupRewards(task, jnp.zeros_like(task), jnp.ones(N, bool), valid)
    return advantages(rewards, replace(spec, use_quality=False), hyper()).solver


def our_spec(loss: LossConfig) -> LearnerSpec:
    return learner_spec(CONFIG, loss, OPT, (TEMPERATURE, 1.0))


def our_batch(play: Play, case: Case) -> LearnBatch:
    task = jnp.asarray(play.rewards.reshape(N, G), jnp.float32)
    lengths = jnp.asarray(list(map(len, play.prompts)), jnp.int32)
    rows = make_rows(
        prompts=(padded(play.prompts, jnp.int32, int(lengths.max())), lengths),
        sampled=Sampled(
            tokens=padded(play.completions, jnp.int32, LONGEST),
            lengths=jnp.asarray(LENGTHS, jnp.int32),
            logprobs=padded(play.logprobs, jnp.float32, LONGEST),
            log_mass=jnp.zeros((N * G, LONGEST)),
        ),
        advantages_B=our_advantages(task, jnp.ones((N, G), bool), case.loss.spec).reshape(-1),
        counts_B=jnp.ones(N * G, bool),
        scale=1.0,
        loss_type=case.loss.loss_type,
    )
    return LearnBatch(rows, None)


def our_gradient(play: Play, case: Case, directories: dict[int, Path]) -> tuple[Any, Any, LearnBatch]:
    """Metrics and gradient by the functions that a run calls, and the batch with its old log-probabilities."""
    played, reference = parameters(directories, PLAYED), parameters(directories, REFERENCE)
    batch, spec = our_batch(play, case), our_spec(case.loss)
    if case.moved:
        # recomputed by the learner, as importance correction always does: this sampler's own are not the policy's
        correcting = replace(spec, loss=replace(spec.loss, importance_correction=True))
        batch = with_old_logprobs(played, None, batch, correcting)
    references = reference_logprobs(reference, batch, spec)
    now = parameters(directories, MOVED) if case.moved else played
    grads, metrics = gradients(now, batch, references, hyper(case.loss, OPT), spec)
    return metrics, grads, batch


def sampler_logprobs(play: Play, directories: dict[int, Path]) -> list[list[float]]:
    """A sampler that computes otherwise than the learner: the policy's log-probabilities with noise."""
    batch, played = our_batch(play, CASES["sequence"]), parameters(directories, PLAYED)
    exact = np.asarray(reference_logprobs(played, batch, our_spec(loss())).solver.logprobs)
    return [(exact[i, :size] + play.noise[i, :size]).tolist() for i, size in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl(name: str, directories: dict[int, Path], tmp_path: Path) -> None:
    case, play = CASES[name], Play()
    play.logprobs = sampler_logprobs(play, directories)
    trainer = make_trainer(play, case, directories, tmp_path / "trl", play.rewards.tolist())
    inputs = inputs_of(trainer)
    value, expected = their_gradient(trainer, inputs, directories, case, tmp_path / "gradient")
    metrics, grads, batch = our_gradient(play, case, directories)

    np.testing.assert_allclose(batch.solver.advantages, inputs["advantages"].numpy(), rtol=1e-5, atol=1e-6)
    ours = float(metrics["loss"])
    if case.loss.loss_type == "sequence" and not case.moved and not case.loss.importance_cap:
        # one ratio a sequence, not one a token: its value is 1 once, its gradient the same
        ours += float(jnp.mean(batch.solver.advantages * (1 - jnp.asarray(LENGTHS))))
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, grads, expected)) / optax.tree.norm(expected)
    print(f"{name}: loss {value:.6f}, relative difference {abs(ours / value - 1):.1e}; gradient {float(gap):.1e}")
    if case.loss.kl_estimator == "k3":
        np.testing.assert_allclose(ours, value, rtol=1e-5)
    assert gap < 1e-5
    logged = trainer._metrics["train"]
    if case.loss.beta and not trainer.args.use_bias_correction_kl:
        np.testing.assert_allclose(metrics["solver/kl"], logged["kl"][-1], rtol=1e-4)
    np.testing.assert_allclose(metrics["solver/entropy"], logged["entropy"][-1], rtol=1e-4)
    if case.moved:
        for side in ("low", "high"):
            share = logged[f"clip_ratio/{side}_mean"][-1]
            assert 0.05 < share < 0.6, "or nothing is clipped"
            np.testing.assert_allclose(metrics[f"solver/clip_ratio/{side}"], share, rtol=1e-5)
    if case.loss.importance_cap:
        weights = inputs["importance_sampling_ratio"].numpy()
        real = np.arange(weights.shape[1])[None] < LENGTHS[:, None]
        assert (weights[real] > 1.2999).mean() > 0.1 and weights[real].min() < 0.8
        np.testing.assert_allclose(metrics["solver/importance_weight"], weights[real].mean(), rtol=1e-5)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_equal_trl_with_answers_that_could_not_be_scored(
    scale: str, directories: dict[int, Path], tmp_path: Path
) -> None:
    play, missing = Play(), [1, 6, 7]
    rewards: list[Any] = play.rewards.tolist()
    for index in missing:
        rewards[index] = None
    case = Case(loss(beta=0.0), {"beta": 0.0, "scale_rewards": scale})
    expected = inputs_of(make_trainer(play, case, directories, tmp_path / "trl", rewards))["advantages"].numpy()
    valid = ~np.isin(np.arange(N * G), missing).reshape(N, G)
    task = jnp.asarray(np.where(valid, play.rewards.reshape(N, G), np.nan), jnp.float32)
    ours = our_advantages(task, jnp.asarray(valid), LossSpec(scale_rewards=scale))
    np.testing.assert_allclose(ours.reshape(-1), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.5
