"""The folder of compiled programs that the tests keep from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax._src import compiler

from programs import let_go


def test_the_programs_that_were_read_longest_ago_go(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / "processor" / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 10)
        os.utime(path, (1_000_000 - age, 1_000))
    (tmp_path / "processor" / "notes").write_text("not a program")
    let_go(tmp_path, 25)
    assert {path.name for path in tmp_path.rglob("*-cache")} == {"new-cache", "middle-cache"}
    let_go(tmp_path, 0)
    assert not list(tmp_path.rglob("*-cache")) and (tmp_path / "processor" / "notes").is_file()
    let_go(tmp_path / "not" / "there", 25)


def test_only_quick_programs_are_compiled_differently_from_a_users() -> None:
    found = {}
    for quick in (True, False):
        jax.config.update("jax_disable_most_optimizations", quick)  # conftest.py sets it anew for every test
        options = compiler.get_compile_options(1, 1, backend=jax.devices()[0].client)
        found[quick] = dict(options.env_option_overrides)
    older = jax.__version_info__ < (0, 11)
    assert found == {True: {"xla_cpu_use_fusion_emitters": False} if older else {}, False: {}}
