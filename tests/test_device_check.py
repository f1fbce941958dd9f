"""The device check: its counting against programs and arrays, what it does when a part fails, and its small mode."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from lsp_jax.model import llama, modules
from lsp_jax.model.known_models import SHAPES
from lsp_jax.model.kv_cache import empty_decode_cache
from lsp_jax.play.selfplay import PlayConfig
from tiny import tiny_config, tiny_params

ROOT = Path(__file__).parent.parent
QUICK_COMPILES = True


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import device_check

    return device_check


def products(jaxpr: Any) -> int:
    """Operations of all matrix products, those in a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("tied", [True, False])
def test_update_operations_are_those_of_the_program(tied: bool, check: Any):
    config, rows, width, completion = tiny_config(tie_word_embeddings=tied), 3, 10, 4
    params = llama.params_shape(config)

    def loss(params: llama.Params, tokens: jax.Array) -> jax.Array:
        hidden = llama.hidden_states(params, config, tokens)[:, -completion:]
        return jnp.sum(llama.logits(params, config, hidden))

    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    program = products(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * width**2 * rows
    # XLA's attention multiplies the masked half too, which is no use to anyone
    assert check.parts.update_flops(config, rows, width, completion) == program - attention


@pytest.mark.parametrize("tied", [True, False])
def test_decode_bytes_are_those_of_the_arrays(tied: bool, check: Any):
    config, play, prompt = tiny_config(tie_word_embeddings=tied), PlayConfig(2, 3, 5, 8), 7
    params = llama.cast(tiny_params(config), "bfloat16")
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not tied:
        read -= params["model"]["embed_tokens"]["weight"].nbytes
    tokens = jnp.zeros((2, prompt), jnp.int32)
    _, prompts = jax.eval_shape(lambda p: llama.extend(p, config, tokens, jnp.full(2, prompt)), params)
    generated = empty_decode_cache(config, 6, play.max_completion_length, jnp.dtype("bfloat16"))
    read += 2 * (prompts.keys.size + prompts.values.size)
    read += sum(leaf.nbytes for leaf in jax.tree.leaves(generated)) / 2  # filled from empty to full
    assert check.parts.decode_bytes(config, play, prompt) == read


def test_weights_of_known_shapes(check: Any):
    for name, billions in (("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213)):
        config = SHAPES[name]
        parameters = config.num_hidden_layers * check.parts.layer_weights(config)
        parameters += config.vocab_size * config.hidden_size
        assert parameters / 1e9 == pytest.approx(billions, abs=1e-3)


ABOUT = {"device": {"kind": "GPU"}, "small": False}


@pytest.mark.full
def test_a_part_that_fails_is_reported_and_the_others_go_on(check: Any, tmp_path: Path):
    def too_large() -> Any:
        error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
        error.add_note("(in update)")
        raise error

    results = check.Check(1000, tmp_path / "a.json", ABOUT)
    failed = results.attempt("iteration", too_large)
    assert failed["failed"].startswith("does not fit in memory: RESOURCE_EXHAUSTED") and "more" not in failed["failed"]
    assert failed["failed"].endswith("9 bytes. (in update)")
    assert results.attempt("update", lambda: {}["x"])["failed"] == "KeyError: 'x'"
    fine = results.attempt("parity", lambda: {"within": True, "logits_relative_error": 0.01})
    results.report["models"]["m"] = {"iteration": failed, "parity": fine}
    text = check.table(results.report)
    assert f"| logits, relative error (at most {check.parts.LOGITS_TOLERANCE}) | 0.0100 |" in text
    assert "| whole iteration, s | - |" in text
    assert text.endswith("m iteration failed: " + failed["failed"])
    assert check.failures(results.report) == ["m iteration"]
    results.report["models"]["m"] = {"parity": {"within": False}}
    assert check.failures(results.report) == ["m parity"]


def test_a_part_without_time_is_skipped(check: Any, tmp_path: Path):
    results = check.Check(check.NEEDED["iteration"] - 1, tmp_path / "a.json", ABOUT)
    assert "90 needed" in results.attempt("iteration", dict)["skipped"]
    assert results.attempt("ceilings", lambda: {"gemm_tflops": 1.0})["gemm_tflops"] == 1.0


@pytest.mark.full
def test_at_the_end_of_the_budget_it_writes_and_stops(tmp_path: Path):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import time, threading; from pathlib import Path;"
        "from device_check import Check;"
        "check = Check(99, Path(sys.argv[1]), {'device': {'kind': 'x'}, 'small': False});"
        "threading.Timer(0.1, check.stop).start(); check.attempt('ceilings', lambda: time.sleep(9000))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    assert subprocess.run(command, cwd=ROOT, env=bare(), timeout=300, check=False).returncode == 1
    assert json.loads((tmp_path / "a.json").read_text())["stopped"] == "the budget ended in part ceilings"


def test_without_an_accelerator_it_says_what_to_do(check: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert check.main(["--output", str(tmp_path / "a.json")]) == 2
    assert "--small" in capsys.readouterr().err and not (tmp_path / "a.json").exists()


@pytest.mark.full
def test_small_mode_measures_everything(check: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    # a budget of which a busy machine skips no part
    assert check.main(["--small", "--output", str(tmp_path / "a.json"), "--budget", "9000"]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["small"] and report["device"]["platform"] == "cpu"
    assert {"jax", "flax", "optax", "python"} <= set(report["versions"]) and report["date"] and report["command"]
    assert all(report["ceilings"][name] > 0 for name in ("gemm_tflops", "bandwidth_gbytes"))
    model = report["models"]["tiny"]
    assert all(result[name] > 0 for part, name in POSITIVE for result in [model[part]])
    assert model["iteration"]["metrics"]["sampling/token_mult_prob_error"] == pytest.approx(1, abs=0.02)
    assert set(model["iteration"]["phases"]) >= {"challenge", "solve", "preference", "quality", "reference", "update"}
    assert model["parity"]["within"] and model["parity"]["logits_relative_error"] > 1e-4, "bfloat16 was used"
    printed = capsys.readouterr().out
    assert "no figures of an accelerator" in printed and "failed" not in printed and "skipped" not in printed


@pytest.mark.full
def test_parity_notices_a_pass_that_is_wrong_in_bfloat16_alone(check: Any, monkeypatch: pytest.MonkeyPatch):
    right = modules.rotate
    monkeypatch.setattr(modules, "rotate", lambda x, angles: right(x, angles) if x.dtype == jnp.float32 else x)
    result = check.parts.parity(check.TINY, check.SMALL)
    assert not result["within"] and result["logits_relative_error"] > 2 * result["logits_tolerance"]


POSITIVE = (
    ("iteration", "seconds"),
    ("update", "share_of_gemm"),
    ("update", "tokens_per_second"),
    ("decode", "share_of_bandwidth"),
    ("decode", "tokens_per_second"),
)


# --- a bare environment ---------------------------------------------------------------------------------------------

BARE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(f"{name} is not in a bare environment")

sys.meta_path.insert(0, Absent())
for name in %r:
    importlib.import_module(name)
import lsp_jax
[getattr(lsp_jax, name) for name in lsp_jax.__all__]
import jax
assert not jax._src.xla_bridge.backends_are_initialized()
"""
ABSENT = ("tyro", "sentencepiece", "jinja2", "gguf", "tiktoken", "sympy", "datasets", "torch")
ABSENT += ("tensorboardX", "wandb", "trackio")


def bare() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.full
def test_importing_the_package_needs_only_jax_flax_optax_orbax_safetensors_and_transformers():
    needed = {
        re.split(r"[^\w-]", line)[0] for line in metadata.requires("transformers") or () if "extra ==" not in line
    }
    assert {"huggingface-hub", "tokenizers", "tqdm"} <= needed, "these come with transformers"
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "lsp_jax").rglob("*.py"))
        # the command line, and what runs inside the sandbox or a worker
        if path.name not in ("cli.py", "__main__.py", "__init__.py", "sandbox_main.py", "worker_main.py")
    ]
    subprocess.run([sys.executable, "-c", BARE % (ABSENT, modules)], cwd=ROOT, env=bare(), check=True, timeout=300)
