"""How the command fails: one line that says what happened, one that says what to do, and an exit code."""

from __future__ import annotations

from enum import IntEnum

_OUR_PACKAGES = frozenset({"autoscaler_svc", "benchmarks", "common", "executor_svc", "scheduler_svc"})
_REFUSALS = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "FAILED_PRECONDITION"})


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
    package = type(error).__module__.partition(".")[0]
    if package == "paceline":
        return _sdk_error(error)
    if package in _OUR_PACKAGES:
        message, _, remedy = str(error).rpartition("; ")  # our messages end with the way out
        return CommandError(message or remedy, remedy if message else "")
    return CommandError(f"{type(error).__name__}: {error}", "run `paceline --debug …` for the traceback")


def _sdk_error(error: Exception) -> CommandError:
    """An error of the SDK; what it means here follows from the gRPC status that it stands for."""
    from paceline import PacelineError

    if not isinstance(error, PacelineError):
        return CommandError(str(error))
    exit_code, what_to_do = ExitCode.FAILED, error.what_to_do
    status = error.code.name
    message = str(error)
    if status == "UNAVAILABLE":
        exit_code = ExitCode.UNREACHABLE
        if "failed to connect" in message:  # gRPC's own words name every address that a name stands for
            message = f"no server answers: {error.message.rpartition(': ')[2]}"
        what_to_do = "start a server with `paceline serve`, or name one with --server"
        if "no executor has joined" in message:
            what_to_do = "start an executor with `paceline executor`, or an autoscaler that does"
        elif "is shutting down" in message:
            message = message.replace("; retry with backoff", "")
            what_to_do = "try again in a moment, when it or another server is there"
    elif status in _REFUSALS:
        exit_code = ExitCode.REFUSED
    if error.retry_after_s is not None:
        what_to_do = f"try again in {error.retry_after_s:g} s"
    elif status == "INTERNAL":
        what_to_do = "report it with the id of the request"
    elif status == "DEADLINE_EXCEEDED" and "no executor is there" in message:
        exit_code, what_to_do = ExitCode.REFUSED, "allow more time with --timeout"
        message = message.rpartition("; ")[0]
    elif status == "DEADLINE_EXCEEDED":
        what_to_do = "allow more time with --timeout, a shorter prompt, or fewer tokens with --max-tokens"
    elif status == "DATA_LOSS":
        what_to_do = "run the command again: the server was restarted and does not know the answer any more"
    return CommandError(message, what_to_do, exit_code=exit_code)
