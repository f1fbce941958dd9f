"""Which cases of a test run every day; the others are marked `full`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def everyday(cases: Iterable[Any], *numbers: int) -> list[Any]:
    """The cases of a test, of which only those at `numbers` belong to the everyday subset."""
    return [case if n in numbers else pytest.param(case, marks=pytest.mark.full) for n, case in enumerate(cases)]
