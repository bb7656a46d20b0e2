"""Executors that are gone and may come back, with the requests that wait for them; and what they bring when they do."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler_svc.core.plan import Capacity, HeldAttempt, HeldState, Inventory, ProtocolError
from scheduler_svc.core.request import Request, RequestState

KILL_LIMIT = 2
"""Executors that a request may kill, without getting a token in between, before it is not tried again."""


@dataclass(slots=True)
class Absence:
    """An executor whose stream has ended, or which a restarted scheduler has not reached yet.

    Its requests are not queued: whoever else took them would have to compute again what it still has.
    """

    requests: dict[Request, None] = field(default_factory=dict)  # WAITING, each `awaits` this executor
    computing: set[Request] = field(default_factory=set)  # of them, those that it computed when it was last heard of
    prime_suspect: Request | None = None  # of these, the one who must have done it if it died of one


def check_inventory(inventory: Inventory, capacity: Capacity) -> None:
    """Refuse what no correct executor of that capacity says. Raises `ProtocolError`."""
    slots = [held.slot for held in inventory.held if held.slot is not None]
    owners = [held.request for held in inventory.held if held.slot is not None and held.request is not None]
    if len(set(owners)) != len(owners):
        raise ProtocolError("the inventory has a request in two slots")
    if len(set(slots)) != len(slots) or any(slot >= capacity.slot_count for slot in slots):
        raise ProtocolError(f"the inventory names the slots {sorted(slots)}; there are {capacity.slot_count}")
    for held in inventory.held:
        if held.slot is not None and held.request is not None:
            _check_tables(held, capacity)


def _check_tables(held: HeldAttempt, capacity: Capacity) -> None:
    if len(held.block_tables) != len(capacity.layer_groups):
        raise ProtocolError(
            f"slot {held.slot} has {len(held.block_tables)} block tables, the model has "
            f"{len(capacity.layer_groups)} layer groups"
        )
    for group, entries in zip(capacity.layer_groups, held.block_tables, strict=True):
        seen = entries[group.first_block(held.computed_count) :]
        if any(block >= capacity.block_count for block in seen):
            raise ProtocolError(f"slot {held.slot} names block {max(seen)}, but there are {capacity.block_count}")
        if held.computed_count > len(entries) * group.block_size:
            raise ProtocolError(
                f"slot {held.slot} has {held.computed_count} computed tokens but {len(entries)} blocks in a layer group"
            )


def can_go_on(held: HeldAttempt) -> bool:
    """Whether the request, whose tokens are those of the attempt by now, can go on in its slot."""
    request = held.request
    if held.slot is None or request is None or request.state is not RequestState.WAITING:
        return False
    if request.output_ids != held.output_ids:
        return False  # another attempt had more, or something else
    missing = len(request.token_ids) - held.computed_count
    if held.state is HeldState.DECODING:
        return missing == 1
    return held.state is HeldState.CATCHING_UP and missing > 0


def kill_message(request: Request) -> str:
    """Why a request is not tried again."""
    return (
        f"request '{request.request_id}' is given up: {request.kill_count} executors in a row died while they "
        f"computed it, and it is not tried on another one"
    )
