"""Fixtures shared by the tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # torch's threads of one worker wait for the cores of another by spinning: twenty greedy answers took two minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# With libtpu installed JAX looks for a TPU for seconds in every process, and with CUDA for a GPU; tests are of the CPU
# unless somebody asks for another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

PROGRAMS = Path(os.environ.get("LSP_JAX_TEST_PROGRAMS") or Path(__file__).parents[1] / ".cache" / "programs").absolute()
"""Compiled programs, kept from run to run. JAX names each by what it is made of, the versions of the compiler and all
its options among it, so that any Python, any jax and any state of the sources can share the folder."""
MOST_BYTES = 2 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Refuse implicit rank promotion: an added axis that was not meant is an error in every test.

    What is compiled is kept for the workers, for processes that tests start, and for the next run: the tiny models'
    programs are the same ones over and over. The user's own cache is neither read nor filled.
    """
    first = "PYTEST_XDIST_WORKER" not in os.environ
    if first:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    import jax

    import programs
    from lsp_jax.core.runtime import keep_programs

    if first:
        programs.let_go(PROGRAMS, MOST_BYTES)
    keep_programs(str(PROGRAMS))  # in a folder of this processor's kind
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_numpy_rank_promotion", "raise")


LONGEST = ("sharding", "update", "resume", "fast_start", "lora", "device_check", "generate", "collapse", "chunks")
LONGEST += ("judge_text", "exact_game", "inner_epochs", "learning")
"""By the CPU time of their tests, measured in one process on the first run of a checkout, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: begun last, one would keep one worker busy while the other has nothing left."""
    place = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models spend their time in the compiler: most of it is saved, and arithmetic stays what it is.

    Before any fixture, so that fixtures and test compile alike; a module's `QUICK_COMPILES` decides for all its tests.
    """
    import jax

    heavy = any(item.get_closest_marker(name) for name in ("full", "slow"))
    quick = getattr(item.getparent(pytest.Module).obj, "QUICK_COMPILES", not heavy)
    jax.config.update("jax_disable_most_optimizations", quick)
    # programs of the two ways differ in their last bits, and JAX would take one for the other: this number is of no
    # consequence but that it is a part of what they are kept under
    jax.config.update("jax_xla_profile_version", 2 if quick else 1)


MOST_MAPPINGS = 25_000


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """Every compiled program takes mappings of memory, and Linux gives a process 65,530: a worker that has compiled for
    many modules lets its programs go before the compiler is refused one and dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Hugging Face directory, converted once for all workers; read only."""
    from lsp_jax.model.gguf import demo_model

    given = os.environ.get("LSP_JAX_DEMO_MODEL", "")
    if given and Path(given).is_dir():
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "demo-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker converts, the others wait and find it done
        return demo_model(shared / "demo-model")


@pytest.fixture(scope="module")
def game_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model that a run can play with; read only."""
    from test_trainer import game_dir

    return game_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def whole_run(game_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the last state of a run of 2k steps that nothing interrupted, with checkpoints at k and 2k."""
    from test_resume import config_of, train

    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, train(config_of(game_model, directory))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights raises `WeightsRead`."""
    from lsp_jax import policy
    from lsp_jax.evaluate import models
    from lsp_jax.training import setup
    from refusal import WeightsRead

    def fail(*_: Any) -> None:
        raise WeightsRead

    monkeypatch.setattr(policy, "load_params", fail)
    monkeypatch.setattr(setup, "load_params", fail)
    monkeypatch.setattr(models, "load_params", fail)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Everything below `tmp_path` must stay as it was, the output directory `tmp_path/run` included."""
    from refusal import Refused

    return Refused(capsys, tmp_path)


@pytest.fixture
def train(game_model: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """A command that would train; later arguments override."""

    def arguments(*more: Any) -> list[Any]:
        short = ["--prompts.challenger", "Ask.", "--play.max-query-length", 8, "--play.max-completion-length", 8]
        return ["train", "--model", game_model, "--output-dir", tmp_path / "run", *short, *more]

    return arguments
