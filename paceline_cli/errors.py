"""How the command fails: one line that says what happened, one that says what to do, and an exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the command's exit code means; the help of `paceline` lists them."""

    OK = 0
    FAILED = 1  # the server or the model failed
    USAGE = 2  # the command line is wrong; trying it again cannot help
    UNREACHABLE = 3  # no server answers at the address
    REFUSED = 4  # the server is there and refuses this request
    INTERRUPTED = 130  # Ctrl-C


class CommandError(Exception):
    """Ends the command with a message and without a traceback."""

    def __init__(self, message: str, what_to_do: str = "", *, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.what_to_do = what_to_do
        self.exit_code = exit_code


def command_error(error: Exception) -> CommandError:
    """`error` as a user of the command line sees it; the SDK's own errors keep their message and remedy."""
    if isinstance(error, CommandError):
        return error
    from paceline import PacelineError

    if isinstance(error, PacelineError):
        message = f"{error.message} (request {error.request_id})" if error.request_id else error.message
        return CommandError(message, error.what_to_do, exit_code=_exit_code(error))
    return CommandError(f"{type(error).__name__}: {error}", "run `paceline --debug …` for the traceback")


def _exit_code(error: Exception) -> ExitCode:
    """The exit code for an SDK error, by the gRPC status that the server answered with."""
    status = getattr(getattr(error, "code", None), "name", "")
    if status == "UNAVAILABLE":
        return ExitCode.UNREACHABLE
    refusals = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "FAILED_PRECONDITION"}
    return ExitCode.REFUSED if status in refusals else ExitCode.FAILED
