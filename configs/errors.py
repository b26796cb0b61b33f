"""Errors that reach a user as one line and an exit code. Everything else is a bug and keeps its traceback."""


class TracestillError(Exception):
    """Base of the project's own errors. The message is one line: what, where, expected, remedy."""

    exit_code = 1


class UnusableInput(TracestillError, ValueError):
    """Input that cannot be used: a recipe, a file, a folder, an unbalanced ledger, a missing system tool."""

    exit_code = 2


class Refused(TracestillError, RuntimeError):
    """A gate or a plan said no; the run is intact."""

    exit_code = 3


class Interrupted(TracestillError, RuntimeError):
    """Stopped on request with everything committed; the same command continues."""

    exit_code = 75


class Busy(Interrupted):
    """Another process is at the same thing in the same folder; the same command goes on when that one is done."""

    says = "is already running here"


class Stopped(SystemExit):
    """What a signal's handler raises, wherever the program is; main() ends with its one line and exit code 75. No Exception: an
    event loop, an import that is tried, a library's own `except Exception` would take it for a failure of theirs and go on. No
    KeyboardInterrupt: typer makes a return value of it."""
