"""Exceptions that end a run, each with its exit status, and the formatting of values and causes in messages."""

from __future__ import annotations

LONGEST = 200  # characters of a value shown in a message
LOST_STATUS = 3  # exit status when another process of the run failed
STALLED_STATUS = 4  # no progress
FAILED_STATUS = 5  # the run cannot continue: non-finite numbers or damaged checkpoints
COLLAPSED_STATUS = 6  # self-play collapsed, and the configuration asks to stop then
STOPPED_STATUS = 75  # stopped on request (EX_TEMPFAIL of sysexits.h); `--resume auto` continues the run


class InputError(ValueError):
    """Invalid input; the message names the field, its value and the remedy.

    The command line prints it as one line and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """

    def __init__(self, field: str, value: object, remedy: str):
        self.field: str = field
        self.value: object = value
        self.remedy: str = remedy
        name = field if len(field) <= 2 * LONGEST else field[: 2 * LONGEST] + "..."  # names may come from files
        super().__init__(f"{name} = {shown(value)}: {remedy}")


class ProcessError(RuntimeError):
    """Another process of the run timed out or died; the message names it. Exit status 3."""


class RunError(RuntimeError):
    """The run cannot continue; the message says what failed and what was saved. Exit status 5."""

    status = FAILED_STATUS


class Collapsed(RunError):
    """Self-play collapsed and the run stopped as configured (`health`), after saving. Exit status 6."""

    status = COLLAPSED_STATUS


class Stopped(RunError):
    """The run stopped on a signal or a preemption notice, after saving. Exit status 75."""

    status = STOPPED_STATUS


def shown(value: object, longest: int = LONGEST) -> str:
    """Returns the `repr` of a value, truncated to `longest` characters."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, an integer beyond Python's digit limit, or anything that a class raises
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else text[:longest] + "..."


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns the type and message of an exception on one line of at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises InputError naming the field `name` unless its value is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(name, value, f"must be one of {', '.join(allowed)}")
