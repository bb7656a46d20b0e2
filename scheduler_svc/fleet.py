"""The fleet: which executors have a lease, and a link to each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
import structlog

from common.errors import RefusedError, invalid, shown
from common.processes import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, RELEASE, common_protocol
from paceline.v1 import fleet_pb2
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.layer_groups import LayerGroup
from scheduler_svc.core.plan import Capacity
from scheduler_svc.engine import Engine
from scheduler_svc.executor_link import ExecutorLink
from scheduler_svc.journal import records
from scheduler_svc.journal.journal import Journal

log = structlog.get_logger()

_LOOK_EVERY_S = 0.25
_REPLACED_LIMIT = 1000
MAX_LAYER_GROUPS = 255
MAX_COMMON_BLOCK_SIZE = 65536
MAX_FINISH_S = 86400


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What executors say of the model; the same from all of them."""

    context_length: int
    vocabulary_size: int
    end_token_ids: tuple[int, ...]


@dataclass(eq=False)
class Member:
    """An executor process with a lease."""

    joined: fleet_pb2.JoinRequest
    link: ExecutorLink
    lease_ends_at: float
    hands_over_at: float = math.inf  # when what still runs there moves: it is being drained
    keeping: asyncio.Task[None] = field(init=False)


class Fleet:
    """Takes executors up, renews their leases, and gives up those that fall silent or get stuck."""

    def __init__(
        self,
        config: SchedulerConfig,
        model_name: str,
        fingerprint: str,
        owner: tuple[int, str],
        engine: Engine,
        journal: Journal,
    ) -> None:
        """Start empty. Only executors whose model has this fingerprint may join."""
        self.limits: ModelLimits | None = None  # of the model, once an executor has joined
        self.limits_known = asyncio.Event()
        self.members: dict[str, Member] = {}
        self.epoch = owner[0]
        self._config = config
        self._model_name = model_name
        self._fingerprint = fingerprint
        self._owner = owner
        self._engine = engine
        self._journal = journal
        self._replaced: dict[int, None] = {}  # incarnations whose place another took, oldest first
        self._wedged: set[int] = set()  # incarnations whose device got stuck: they must restart
        self._clock: Callable[[], float] = time.monotonic

    def join(self, request: fleet_pb2.JoinRequest) -> fleet_pb2.JoinResponse:
        """Give a lease or renew it. Raises `RefusedError` for an executor that cannot serve here."""
        self._check(request)
        member = self.members.get(request.executor_id)
        if member is not None and member.joined.incarnation != request.incarnation:
            self._replace(member, request.incarnation)
            member = None
        lease = fleet_pb2.JoinResponse(lease_ms=round(self._config.lease_s * 1000))
        if member is None and request.draining:  # has been let go, or never held anything
            return lease
        if member is None:
            member = self._take_up(request)
        member.lease_ends_at = self._clock() + self._config.lease_s
        if request.draining and not member.joined.draining:
            log.info("executor drains", executor_id=request.executor_id)
            member.joined = request
            member.link.draining = True
            self._engine.drain(member.link)
        return lease

    def _replace(self, member: Member, newcomer: int) -> None:
        """Give up a process whose place another one wants, unless it is alive: then the newcomer has to wait."""
        executor_id = member.joined.executor_id
        if newcomer in self._replaced:
            raise _mismatch(f"executor '{executor_id}' was replaced by a later process; this one must end")
        if member.link.is_attached:
            raise RefusedError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"another process is attached as executor '{executor_id}'; choose another --executor-id, or stop it",
            )
        log.warning("executor was replaced", executor_id=executor_id)
        self._replaced[member.joined.incarnation] = None
        while len(self._replaced) > _REPLACED_LIMIT:
            del self._replaced[next(iter(self._replaced))]
        self._give_up(member, died=True)

    def _take_up(self, request: fleet_pb2.JoinRequest) -> Member:
        link = ExecutorLink(
            executor_id=request.executor_id,
            incarnation=request.incarnation,
            address=request.address,
            capacity=capacity_of(request.capacity),
            owner=self._owner,
            protocol_version=_protocol_of(request) or PROTOCOL_VERSION,
            events=self._engine,
            clock=self._clock,
        )
        member = Member(request, link, lease_ends_at=0.0)
        member.keeping = asyncio.create_task(link.keep(), name=f"link {request.executor_id}")
        self.members[request.executor_id] = member
        self._engine.scheduler.expect(capacity_of(request.capacity))
        self._journal.append(records.Joined(request.executor_id, request.SerializeToString()))
        model = request.model
        self.limits = ModelLimits(model.context_length, model.vocabulary_size, tuple(model.end_token_ids))
        self.limits_known.set()
        log.info("executor joined", executor_id=request.executor_id, address=request.address, mode=model.mode)
        return member

    def _give_up(self, member: Member, *, died: bool = False) -> None:
        self._journal.append(records.Left(member.joined.executor_id))
        self._close(member, died=died)

    def _close(self, member: Member, *, died: bool = False) -> None:
        del self.members[member.joined.executor_id]
        member.keeping.cancel()
        self._engine.lost(member.link, died=died)

    def restore(self, messages: Iterable[bytes]) -> None:
        """Take up the executors of an earlier life of the scheduler; those that are gone do not renew their lease."""
        for message in messages:
            request = fleet_pb2.JoinRequest.FromString(message)
            try:
                self.join(request)
            except RefusedError as error:  # the model was exchanged meanwhile
                log.warning("executor not taken over", executor_id=request.executor_id, reason=error.message)

    @property
    def has_any(self) -> bool:
        """Whether anybody has joined who takes requests, or is about to."""
        return any(not (member.joined.draining or member.link.draining) for member in self.members.values())

    def records(self) -> list[records.Record]:
        """Who has a lease, for a journal that knows nobody."""
        return [records.Joined(name, member.joined.SerializeToString()) for name, member in self.members.items()]

    def incarnations(self) -> dict[str, int]:
        """The process behind each name."""
        return {name: member.joined.incarnation for name, member in self.members.items()}

    def drain(self, executor_id: str, finish_within_s: float) -> None:
        """Let an executor finish what it has for so long, move the rest, and let it go. Raises `RefusedError`."""
        member = self.members.get(executor_id)
        if member is None:
            names = ", ".join(sorted(self.members)) or "none"
            raise RefusedError(
                grpc.StatusCode.NOT_FOUND, f"no executor '{shown(executor_id)}' has joined; there are: {names}"
            )
        if finish_within_s > MAX_FINISH_S:
            raise invalid(f"finish_within_s is {finish_within_s:g}, must be 0 to {MAX_FINISH_S}")
        log.info("executor is drained", executor_id=executor_id, finish_within_s=finish_within_s)
        member.hands_over_at = self._clock() + finish_within_s
        member.link.draining = True
        self._engine.drain(member.link)
        if not finish_within_s:
            self._engine.hand_over(member.link)

    async def watch(self) -> None:
        """Give up executors whose lease ran out, whose device is stuck, or which were let go; until cancelled."""
        looked_at = self._clock()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = self._clock()
            overslept_s, looked_at = now - looked_at - _LOOK_EVERY_S, now
            for member in list(self.members.values()):
                member.lease_ends_at += overslept_s  # our own silence is not theirs
                if member.keeping.done():  # drained and detached
                    self._give_up(member)
                elif member.lease_ends_at < now:
                    log.error("executor lost: lease ran out", executor_id=member.joined.executor_id)
                    self._give_up(member)
                elif member.link.is_wedged(now, self._config.step_timeout_s):
                    log.error("executor lost: its step takes too long", executor_id=member.joined.executor_id)
                    self._wedged.add(member.joined.incarnation)
                    self._give_up(member, died=True)
                elif member.hands_over_at <= now:
                    self._engine.hand_over(member.link)

    def close(self) -> None:
        """Let go of everybody; the next life of the scheduler takes them up again."""
        for member in list(self.members.values()):
            self._close(member)

    def _check(self, request: fleet_pb2.JoinRequest) -> None:
        missing = [name for name in ("executor_id", "incarnation", "address") if not getattr(request, name)]
        missing += [name for name in ("model", "capacity") if not request.HasField(name)]
        if missing:
            raise invalid(f"{missing[0]} is missing")
        check_name("executor_id", request.executor_id)
        size, model = request.capacity, request.model
        if _protocol_of(request) is None:
            raise _mismatch(
                f"executor '{request.executor_id}' (release {request.release or 'unknown'}) speaks version "
                f"{request.protocol_version} of the step stream, this scheduler (release {RELEASE}) "
                f"{OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}; run the same release of both, or neighbouring ones"
            )
        if model.fingerprint != self._fingerprint:
            raise _mismatch(
                f"executor '{request.executor_id}' has the model '{model.name}' ({model.fingerprint[:12]}), this "
                f"scheduler serves '{self._model_name}' ({self._fingerprint[:12]}); start both with the same folder"
            )
        if not 1 <= len(size.layer_groups) <= MAX_LAYER_GROUPS or not size.block_count:
            raise invalid(
                f"capacity has {size.block_count} blocks for {len(size.layer_groups)} layer groups; it needs a block, "
                f"and 1 to {MAX_LAYER_GROUPS} groups"
            )
        if not all(group.block_size for group in size.layer_groups):
            raise invalid("capacity has a layer group whose blocks hold 0 tokens; each needs at least 1")
        common_size = math.lcm(*(group.block_size for group in size.layer_groups))
        if common_size > MAX_COMMON_BLOCK_SIZE:
            raise invalid(
                f"the blocks of the layer groups end together only every {common_size} tokens, the limit is "
                f"{MAX_COMMON_BLOCK_SIZE}: nobody could reuse what was computed; make one size a multiple of the other"
            )
        if not 1 <= size.slot_count <= 65535 or size.step_token_count < size.slot_count:
            raise invalid(
                f"capacity has {size.slot_count} slots and steps of {size.step_token_count} tokens; it needs 1 to "
                f"65535 slots and a token for each"
            )
        limits = ModelLimits(model.context_length, model.vocabulary_size, tuple(model.end_token_ids))
        others = self.members.keys() - {request.executor_id}
        in_use = others or self._engine.scheduler.request_count
        if self.limits is not None and limits != self.limits and in_use:
            name = next(n for n in ModelLimits.__slots__ if getattr(limits, n) != getattr(self.limits, n))
            raise _mismatch(
                f"executor '{request.executor_id}' has the {name.replace('_', ' ')} {getattr(limits, name)}, the fleet "
                f"has {getattr(self.limits, name)}; start all executors with the same --max-model-len"
            )
        if request.incarnation in self._wedged:
            raise _mismatch(f"executor '{request.executor_id}' got stuck in a step; it must restart")


def _protocol_of(request: fleet_pb2.JoinRequest) -> int | None:
    """The version of the step stream that an executor and this scheduler both speak."""
    return common_protocol(request.protocol_version, request.oldest_protocol_version or request.protocol_version)


def capacity_of(message: fleet_pb2.ExecutorCapacity) -> Capacity:
    """What an executor says that it holds, as the core has it."""
    groups = tuple(LayerGroup(group.block_size, group.window, group.chunk) for group in message.layer_groups)
    return Capacity(groups, message.block_count, message.slot_count, message.step_token_count)


def state_of(member: Member, engine: Engine) -> fleet_pb2.ExecutorState.ValueType:
    """Where an executor is."""
    if member.joined.draining or member.link.draining:
        return fleet_pb2.EXECUTOR_STATE_DRAINING
    is_there = member.link.is_attached and member.joined.executor_id in engine.scheduler.executors
    return fleet_pb2.EXECUTOR_STATE_READY if is_there else fleet_pb2.EXECUTOR_STATE_CONNECTING


def describe(member: Member, engine: Engine) -> fleet_pb2.Executor:
    """An executor as operators see it."""
    joined = member.joined
    executor = engine.scheduler.executors.get(joined.executor_id) if member.link.is_attached else None
    return fleet_pb2.Executor(
        executor_id=joined.executor_id,
        incarnation=joined.incarnation,
        address=joined.address,
        state=state_of(member, engine),
        model=joined.model,
        capacity=joined.capacity,
        running_request_count=len(executor.running) if executor else 0,
        free_block_count=executor.cache.pool.free_count if executor else joined.capacity.block_count,
        reusable_block_count=executor.cache.pool.reusable_count if executor else 0,
        known_token_count=executor.known_count if executor else 0,
        reused_token_count=executor.reused_count if executor else 0,
        step=member.link.answered_step,
        step_us=member.link.step_us,
        idle_share=member.link.idle_share,
        startup_ms=joined.startup_ms,
    )


def check_name(field_name: str, name: str) -> None:
    """Refuse a name that could not stand in a log. Raises `RefusedError`."""
    if not 1 <= len(name) <= 128 or not name.isascii() or not name.isprintable() or " " in name:
        raise invalid(f"{field_name} {name!r} must be 1 to 128 printable ASCII characters without spaces")


def _mismatch(message: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.FAILED_PRECONDITION, message)
