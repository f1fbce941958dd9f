"""Loading onto a mesh and exporting from it: each device gets its part, and no host more than it needs."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import weights_worker
from lsp_jax.model import weights
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.hf_names import file_tensors
from tiny import tiny_config, tiny_dir, tiny_params
from weights_worker import CHECKS, MODELS


def python(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """`weights_worker` as a process of its own, on CPU devices."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join((str(root), str(root / "tests")))
    command = [sys.executable, weights_worker.__file__, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


def answer(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for every model of `MODELS`, in float32 and in bfloat16; an untied one that says it is tied."""
    base = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        tiny_dir(base / name, **fields)
        config = tiny_config(**fields)
        weights.save_params(tiny_params(config), config, base / f"{name}-bfloat16", "bfloat16", max_shard_bytes=30_000)
    flagged = shutil.copytree(base / "untied", base / "flagged") / "config.json"
    flagged.write_text(json.dumps({**json.loads(flagged.read_text()), "tie_word_embeddings": True}))
    return base


@pytest.fixture(scope="module")
def results(models: Path) -> dict[str, str]:
    return answer(python("checks", models))


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
def test_on_eight_devices(results: dict[str, str], check: str) -> None:
    """The checks of `weights_worker`, each described there; they share one process."""
    assert not results[check], results[check]


@pytest.mark.full
def test_two_processes(models: Path, tmp_path: Path) -> None:
    """Each reads the halves of its devices; process 0 exports what one process would, the other touches nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [python("shared", models, port, index) for index in range(2)]
    found = [answer(process) for process in processes]
    assert found == [{"parts": [32 * 32 // 8], "matrices": 2 * 32 * 32 // 2}] * 2
    assert not (models / "exported-1").exists()
    config = weights.read_config(models / "untied")
    weights.save_params(weights.load_params(models / "untied", config), config, tmp_path, "bfloat16")
    for path in tmp_path.iterdir():
        assert (models / "exported-0" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (models / "exported-0" / "tokenizer.json").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_are_those_of_the_librarys_writer(tmp_path: Path, dtype: str) -> None:
    config = tiny_config(tie_word_embeddings=False, attention_bias=True)
    weights.save_params(tiny_params(config), config, tmp_path, dtype)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


def test_mixed_types_are_written_aligned(tmp_path: Path) -> None:
    """Parameters of several types keep theirs, as the library's writer orders them."""
    config = tiny_config()
    params = tiny_params(config)
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].astype("bfloat16")
    weights.save_params(params, config, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.norm.weight"].dtype == ml_dtypes.bfloat16
    save_file(stored, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random bfloat16 weights of Llama 3.2 1B's shape (1.24e9 parameters), written a few tensors at a time."""
    base = tmp_path_factory.mktemp("billion")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    tensors = list(file_tensors(config))
    random = np.random.default_rng(0)
    weight_map = {}
    for start in range(0, len(tensors), 9):
        name = f"model-{start:05d}.safetensors"
        save_file(
            {tensor.name: random_bfloat16(random, tensor.shape) for tensor in tensors[start : start + 9]}, base / name
        )
        weight_map |= {tensor.name: name for tensor in tensors[start : start + 9]}
    (base / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    yield base
    shutil.rmtree(base)


def random_bfloat16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits, all finite: below 2 in magnitude."""
    bits = random.integers(0, 1 << 16, shape, np.uint16) & 0xBFFF
    return bits.view(ml_dtypes.bfloat16)


class Watched:
    """A process that says a line before each of its steps; what a step's anonymous memory peaks at, in bytes."""

    def __init__(self, *arguments: Any):
        self.process = python(*arguments, stdin=subprocess.PIPE)

    def anonymous(self) -> int:
        """RssAnon: mapped file pages are not in it, as they are in the peak that the kernel keeps (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def facts(self) -> tuple[dict[str, Any], int]:
        """The next line, and the peak until it came, looked at from outside every 2 milliseconds."""
        assert self.process.stdout is not None
        peak = 0
        while not select.select([self.process.stdout], [], [], 0.002)[0]:
            peak = max(peak, self.anonymous())
        line = self.process.stdout.readline()
        assert line, "the process has ended"
        return json.loads(line), max(peak, self.anonymous())

    def step(self) -> tuple[dict[str, Any], int]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.facts()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("devices", [8, 1])
def test_a_billion_parameters_fit_in_little_more_than_their_bytes(billion: Path, devices: int, dtype: str) -> None:
    """Loading peaks below 1.35 x the parameters' bytes; exporting adds the embedding twice (on devices and host)."""
    watched = Watched("memory", billion, devices, dtype)
    try:
        watched.facts()
        before = watched.anonymous()
        loaded, peak = watched.step()
        after = watched.anonymous()
        _, export_peak = watched.step()
    finally:
        watched.process.kill()
        watched.process.wait()
    size = loaded["bytes"]
    figures = {"load": (peak - before) / size, "held": (after - before) / size, "export": (export_peak - after) / size}
    print(f"{devices} devices, {dtype}, {size / 1e9:.3f} GB in {loaded['seconds']:.0f} s:", figures)
    assert size == (2 if dtype == "bfloat16" else 4) * 1_235_814_400
    assert all(held < 1.01 * size / devices for held in loaded["held"])
    assert figures["load"] < 1.35
    embedding = size / 1_235_814_400 * 128256 * 2048
    assert figures["export"] < 2.1 * embedding / size
