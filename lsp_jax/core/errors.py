"""The errors that end a run, each with its exit status: what a user must change, which process is at fault, what the
run itself could not go on with. And how values and texts are shown in them."""

from __future__ import annotations

LONGEST = 200  # characters of a value worth showing
LOST_STATUS = 3  # exit status of a process that ends because of another one
STALLED_STATUS = 4  # of a run without progress
FAILED_STATUS = 5  # of a run that cannot go on: its numbers, or its checkpoints
COLLAPSED_STATUS = 6  # of a run whose self-play has collapsed, where it was told to end then
STOPPED_STATUS = 75  # of a run that was asked to end (EX_TEMPFAIL of sysexits.h): --resume auto goes on


class InputError(ValueError):
    """Input that cannot be used: names the field, the value found and what would be right.

    The command line prints it as one line and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """

    def __init__(self, field: str, value: object, remedy: str):
        self.field: str = field
        self.value: object = value
        self.remedy: str = remedy
        name = field if len(field) <= 2 * LONGEST else field[: 2 * LONGEST] + "..."  # names come out of files, too
        super().__init__(f"{name} = {shown(value)}: {remedy}")


class ProcessError(RuntimeError):
    """Another process of the run is late or dead: names it.

    The command line prints it as one line and exits with status 3.
    """


class RunError(RuntimeError):
    """The run cannot go on: says what failed, and what is saved. Exit status 5."""

    status = FAILED_STATUS


class Collapsed(RunError):
    """Self-play has collapsed, and the run was told to end then (`health`); it has saved. Exit status 6."""

    status = COLLAPSED_STATUS


class Stopped(RunError):
    """The run was asked to end, by a signal or a preemption notice, and has saved. Exit status 75."""

    status = STOPPED_STATUS


def shown(value: object, longest: int = LONGEST) -> str:
    """A value as Python writes it, at most `longest` characters of it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of more digits than Python writes
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else text[:longest] + "..."


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises InputError naming the field `name` unless its value is one of those that are `allowed`."""
    if value not in allowed:
        raise InputError(name, value, f"must be one of {', '.join(allowed)}")
