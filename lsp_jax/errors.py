"""The errors that end a run, each with its exit status: what a user must change, which process is at fault, what the
run itself could not go on with."""

from __future__ import annotations

LONGEST = 200  # characters of a value worth showing
LOST_STATUS = 3  # exit status of a process that ends because of another one
STALLED_STATUS = 4  # of a run without progress
FAILED_STATUS = 5  # of a run that cannot go on: its numbers, or its checkpoints
STOPPED_STATUS = 75  # of a run that was asked to end (EX_TEMPFAIL of sysexits.h): --resume auto goes on


class InputError(ValueError):
    """Input that cannot be used: names the field, the value found and what would be right.

    The command line prints it as one line and exits with status 2; in a notebook it is an ordinary `ValueError`.
    """

    def __init__(self, field: str, value: object, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        shown = repr(value)
        if len(shown) > LONGEST:
            shown = shown[:LONGEST] + "..."
        super().__init__(f"{field} = {shown}: {remedy}")


class ProcessError(RuntimeError):
    """Another process of the run is late or dead: names it.

    The command line prints it as one line and exits with status 3.
    """


class RunError(RuntimeError):
    """The run cannot go on: says what failed, and what is saved. Exit status 5."""

    status = FAILED_STATUS


class Stopped(RunError):
    """The run was asked to end, by a signal or a preemption notice, and has saved. Exit status 75."""

    status = STOPPED_STATUS
