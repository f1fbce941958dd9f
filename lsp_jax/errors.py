"""The one error that tells a user what to change, and the one that tells which process of several is at fault."""

from __future__ import annotations

LONGEST = 200  # characters of a value worth showing
LOST_STATUS = 3  # exit status of a process that ends because of another one


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
