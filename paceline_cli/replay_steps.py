"""Generates a recorded request again, token by token, on one executor in this process.

Apart from gRPC everything is real: the scheduler's core plans, the plans cross the wire format, the executor runs them.
Needs both services, so only a command that replays imports it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace

from executor_svc.batch import Runner, RunnerInfo
from executor_svc.executor import Executor
from paceline.internal.v1 import executor_pb2 as pb
from paceline_cli.errors import CommandError, ExitCode
from scheduler_svc import wire
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity
from scheduler_svc.core.request import FinishReason, Request, RequestState
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.journal.restored import RestoredChoice, RestoredRequest
from scheduler_svc.recorder import request_of

_EXECUTOR = "replay"


class Replayer:
    """A scheduler and an executor that belong to each other alone."""

    def __init__(self, runner: Runner) -> None:
        """Start with an empty cache."""
        self._info = runner.info
        self._executor = Executor(runner)
        self._scheduler = Scheduler()
        self._scheduler.join(_EXECUTOR, _capacity_of(runner.info))

    def tokens(self, recorded: RestoredRequest, choice: int) -> Iterator[int]:
        """For each token of a choice, what comes in its place now, after the prompt and the recorded tokens before it.

        As long as the tokens are the same, this is one request that decodes. After another one it is a new request that
        knows what was recorded up to there, and finds most of that in the cache. Raises `CommandError` when it cannot
        be computed.
        """
        _check_model(recorded, choice, self._info)
        request: Request | None = None
        for index, expected in enumerate(recorded.choices[choice].output_ids):
            if request is None:
                request = _request_after(recorded, choice, index)
                self._scheduler.restore(request.family[0], [""] * len(request.family))
            token = self._next_token(request)
            yield token
            if token != expected or request.state is RequestState.FINISHED:
                self._scheduler.cancel(request)
                request = None

    def _next_token(self, request: Request) -> int:
        """Run steps until the request has one more token."""
        while (plan := self._scheduler.plan(_EXECUTOR, now=0.0)) is not None:
            message = wire.encode_plan(plan, acknowledged_step=plan.step - 1).SerializeToString()
            answer = self._executor.execute(pb.Plan.FromString(message)).SerializeToString()
            result = wire.decode_result(pb.StepResult.FromString(answer))
            outputs = self._scheduler.apply(_EXECUTOR, result)
            if outputs.tokens:
                return outputs.tokens[0][1]
            if request.finish_reason is FinishReason.ERROR:
                raise CommandError(request.error)
        raise CommandError(
            f"request '{request.request_id}' needs more than the {self._info.block_count} blocks of the cache",
            "give it more with --cache-memory",
            exit_code=ExitCode.USAGE,
        )


def _request_after(recorded: RestoredRequest, choice: int, output_count: int) -> Request:
    """One choice of a request when it had so many tokens; made as a restarted scheduler makes it, the others ended."""
    output_ids = recorded.choices[choice].output_ids
    parameters = {**recorded.parameters, "max_output_count": len(output_ids)}  # its end is the last one recorded
    choices = [
        _running(other, output_ids[:output_count]) if other.choice == choice else _ended(other)
        for other in recorded.choices
    ]
    known = replace(recorded, parameters=parameters, choices=choices, deadline_at=None)
    return request_of(known)[0].family[choice]


def _running(choice: RestoredChoice, output_ids: array[int]) -> RestoredChoice:
    return replace(choice, output_ids=output_ids, finish_reason=None, error="")


def _ended(choice: RestoredChoice) -> RestoredChoice:
    return replace(choice, finish_reason=FinishReason.CANCELLED.value)


def _check_model(recorded: RestoredRequest, choice: int, info: RunnerInfo) -> None:
    """Refuse a model that cannot have generated this."""
    known = recorded.prompt_ids + recorded.choices[choice].output_ids
    if len(known) > info.context_length:
        raise CommandError(
            f"request '{recorded.request_id}' has {len(known)} tokens, here the model takes {info.context_length}",
            "raise --max-model-len, or name the model that it was with --model",
            exit_code=ExitCode.USAGE,
        )
    if max(known) >= info.vocabulary_size:
        raise CommandError(
            f"request '{recorded.request_id}' has the token {max(known)}, and the vocabulary of '{info.name}' ends at "
            f"{info.vocabulary_size - 1}",
            "name the model that it was with --model",
            exit_code=ExitCode.USAGE,
        )


def _capacity_of(info: RunnerInfo) -> Capacity:
    groups = tuple(LayerGroup(group.block_size, group.window, group.chunk) for group in info.layer_groups)
    return Capacity(groups, info.block_count, info.slot_count, info.step_token_count)
