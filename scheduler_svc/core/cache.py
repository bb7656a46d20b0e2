"""The paged cache of one executor as the scheduler knows it: block tables over one pool, and what can be used again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler_svc.core.blocks import BlockPool
from scheduler_svc.core.layer_groups import NO_BLOCK, BlockTable, LayerGroup
from scheduler_svc.core.prefix_hashes import extend_hashes
from scheduler_svc.core.request import Request

_LOOKED_UP_AT_ONCE = 64  # entries; a lookup rarely goes further than it finds something


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """The blocks by which a request can be spared the tokens up to `token_count`."""

    token_count: int
    block_ids: tuple[list[int], ...]  # by layer group, from the first block that is still seen
    free_count: int  # of these blocks, those that nobody holds: adopting them uses free ones up


class Cache:
    """Every request's block tables on one executor, one for each layer group, over one pool of blocks."""

    def __init__(self, groups: Sequence[LayerGroup], block_count: int, *, lag: int, reuse: bool) -> None:
        """Start empty. Blocks that slide out of a window are given back up to `lag` tokens, and a block, late."""
        sizes = [group.block_size for group in groups]
        self.groups = tuple(groups)
        self._sizes = tuple(sizes)
        self.pool = BlockPool(block_count, len(groups))
        self.hashed_size = math.gcd(*sizes)  # tokens between two places where some group's block may end
        self.match_size = math.lcm(*sizes)  # tokens between two places where every group's block ends
        self.lag = lag + self.hashed_size  # tokens after which a block that nobody sees is given back at the latest
        self.blocks_per_token = sum(1 / group.block_size for group in groups if group.sees_all)  # in the long run
        self._reuse = reuse

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def most_blocks(self, token_count: int) -> int:
        """Blocks that a request of `token_count` tokens holds at most."""
        return sum(group.most_blocks(token_count, self.lag) for group in self.groups)

    def missing_blocks(self, request: Request, token_count: int) -> int:
        """Blocks that the request must take before `token_count` of its tokens have room."""
        missing = len(request.shared_tails)
        for size, table in zip(self._sizes, request.tables, strict=True):
            short = -(-token_count // size) - table.first - len(table.block_ids)
            if short > 0:
                missing += short
        return missing

    def outstanding_blocks(self, request: Request, token_count: int) -> int:
        """Blocks that it must take, beyond what it gives back meanwhile, until `token_count` tokens are computed."""
        outstanding = len(request.shared_tails)
        for group, table in zip(self.groups, request.tables, strict=True):
            missing = group.blocks_for(token_count) - table.end
            growth = group.most_blocks(token_count, self.lag) - len(table.block_ids)
            outstanding += max(0, min(missing, growth))
        return outstanding

    def starting_blocks(self, token_count: int, found: FoundPrefix | None) -> int:
        """Free blocks that a request needs to start and to have `token_count` tokens computed."""
        if found is None:
            return self.most_blocks(token_count)
        needed = found.free_count
        for group, block_ids in zip(self.groups, found.block_ids, strict=True):
            missing = group.blocks_for(token_count) - found.token_count // group.block_size
            growth = group.most_blocks(token_count, self.lag) - len(block_ids)
            needed += max(0, min(missing, growth))
        return needed

    def private_blocks(self, request: Request) -> int:
        """Blocks that would be free if the request gave its own back."""
        return sum(self.pool.holder_count(block) == 1 for table in request.tables for block in table.block_ids)

    def fitting_tokens(self, request: Request, token_count: int, block_count: int) -> int:
        """How many of its next `token_count` tokens fit when it may take `block_count` blocks."""
        if self.missing_blocks(request, request.planned_count + token_count) <= block_count:
            return token_count
        fits, too_many = 0, token_count
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.missing_blocks(request, request.planned_count + middle) <= block_count:
                fits = middle
            else:
                too_many = middle
        return fits

    # --- block tables -------------------------------------------------------------------------------------------

    def open_tables(self, request: Request) -> None:
        """Give the request empty tables."""
        request.tables = tuple(BlockTable() for _ in self.groups)

    def seen_tables(self, block_tables: Sequence[Sequence[int]], token_count: int) -> tuple[BlockTable, ...]:
        """Block tables as an executor has them, without what no token after the first `token_count` sees."""
        tables = []
        for group, entries in zip(self.groups, block_tables, strict=True):
            first = min(group.first_block(token_count), len(entries))
            tables.append(BlockTable(first, list(entries[first:]), offered=first))
        return tuple(tables)

    def take_over(self, request: Request, tables: tuple[BlockTable, ...], token_count: int) -> None:
        """Give the request tables over claimed blocks, in which its first `token_count` tokens are computed."""
        request.tables = tables
        request.computed_count = request.planned_count = token_count
        self.settle(request)

    def append(self, request: Request, token_count: int) -> list[tuple[int, int]]:
        """Take the blocks that its first `token_count` tokens need; returns (layer group, block) pairs."""
        appended: list[tuple[int, int]] = []
        for number, table in enumerate(request.tables):
            missing = -(-token_count // self._sizes[number]) - table.first - len(table.block_ids)
            if missing > 0:
                for block in self.pool.take(missing):
                    table.block_ids.append(block)
                    appended.append((number, block))
        return appended

    def settle(self, request: Request) -> None:
        """Its `computed_count` went up: offer the blocks that are full, give back those that nobody sees any more."""
        computed = request.computed_count
        for number, table in enumerate(request.tables):
            size = self._sizes[number]
            full_count = computed // size
            if full_count > table.offered:
                if self._reuse:
                    first = max(table.offered, table.first)
                    contents = self._contents(request, number, first, full_count)
                    for content, block in zip(contents, table.block_ids[first - table.first :], strict=False):
                        self.pool.offer(number, content, block)
                table.offered = full_count
            group = self.groups[number]
            if not group.sees_all:
                self.pool.give_back(table.slide(group.first_block(computed)))

    def release(self, request: Request) -> None:
        """Take its blocks back. The last are evicted first: a prefix is of no use without its beginning."""
        if len(request.tables) == 1:
            self.pool.give_back(reversed(request.tables[0].block_ids))
        else:
            placed = [
                (entry * group.block_size, block)
                for group, table in zip(self.groups, request.tables, strict=True)
                for entry, block in enumerate(table.block_ids, start=table.first + 1)
            ]
            self.pool.give_back(block for _, block in sorted(placed, reverse=True))
        request.tables = ()
        request.shared_tails = ()

    # --- reuse --------------------------------------------------------------------------------------------------

    def find_prefix(self, request: Request) -> FoundPrefix | None:
        """The longest continuation of what the request has computed that is in the cache already.

        At least one known token is left to compute, so that a block that is shared is never written. A layer group
        with a window needs only the blocks that are still seen where the prefix ends.
        """
        if not self._reuse or request.planned_count % self.match_size:
            return None
        start = request.planned_count // self.match_size
        end = (len(request.token_ids) - 1) // self.match_size
        for number, group in enumerate(self.groups):
            if group.sees_all:
                end = self._unbroken(request, number, start, end)
        while end > start:
            shortest = min(
                (self._seen(request, number, start, end) for number, g in enumerate(self.groups) if not g.sees_all),
                default=end,
            )
            if shortest == end:
                return self._found(request, end * self.match_size)
            end = shortest
        return None

    def _unbroken(self, request: Request, number: int, start: int, end: int) -> int:
        """Where the first gap is among the blocks of a group in the units [start, end) of `match_size` tokens."""
        offered = self.pool.offered(number)
        per_unit = self.match_size // self._sizes[number]
        for first in range(start * per_unit, end * per_unit, _LOOKED_UP_AT_ONCE):
            last = min(first + _LOOKED_UP_AT_ONCE, end * per_unit)
            for entry, content in enumerate(self._contents(request, number, first, last), start=first):
                if content not in offered:
                    return entry // per_unit
        return end

    def _seen(self, request: Request, number: int, start: int, end: int) -> int:
        """`end`, when all that its group sees from there is in the cache or the request's own; else an earlier end."""
        offered = self.pool.offered(number)
        per_unit = self.match_size // self._sizes[number]
        first = max(self.groups[number].first_block(end * self.match_size), start * per_unit)
        contents = self._contents(request, number, first, end * per_unit)
        for entry in range(end * per_unit - 1, first - 1, -1):
            if contents[entry - first] not in offered:
                return entry // per_unit
        return end

    def _found(self, request: Request, token_count: int) -> FoundPrefix:
        tables: list[list[int]] = []
        for number, group in enumerate(self.groups):
            first = max(group.first_block(token_count), request.planned_count // group.block_size)
            offered = self.pool.offered(number)
            contents = self._contents(request, number, first, token_count // group.block_size)
            tables.append([offered[content] for content in contents])
        free_count = sum(not self.pool.holder_count(block) for table in tables for block in table)
        return FoundPrefix(token_count, tuple(tables), free_count)

    def adopt(self, request: Request, found: FoundPrefix) -> list[tuple[int, int]]:
        """Append what was found to the tables; returns (layer group, block) pairs, `NO_BLOCK` behind the windows."""
        appended: list[tuple[int, int]] = []
        for number, (group, table) in enumerate(zip(self.groups, request.tables, strict=True)):
            block_ids = found.block_ids[number]
            self.pool.share(block_ids)
            self.pool.give_back(table.slide(group.first_block(found.token_count)))
            entry_count = found.token_count // group.block_size
            unseen_count = entry_count - table.end - len(block_ids)
            table.first += unseen_count
            table.block_ids.extend(block_ids)
            table.offered = entry_count
            appended += [(number, NO_BLOCK)] * unseen_count + [(number, block) for block in block_ids]
        request.computed_count = request.planned_count = found.token_count
        return appended

    def units(self, request: Request, start: int, end: int) -> list[bytes]:
        """The contents that a computation of the tokens [start, end) completes or continues, one for each place where a
        request with the same beginning could adopt what is computed.
        """
        if not self._reuse:
            return []
        last = min(-(-end // self.match_size), len(request.token_ids) // self.match_size)
        return [self._unit(request, unit) for unit in range(start // self.match_size, last)]

    def next_unit(self, request: Request) -> bytes | None:
        """The first of `units` that the request could adopt once somebody has computed it."""
        if not self._reuse or request.planned_count % self.match_size:
            return None
        unit = request.planned_count // self.match_size
        return self._unit(request, unit) if unit < (len(request.token_ids) - 1) // self.match_size else None

    def _unit(self, request: Request, unit: int) -> bytes:
        count = (unit + 1) * self.match_size // self.hashed_size
        return self._hashes(request, count)[count - 1]

    def _contents(self, request: Request, number: int, first: int, end: int) -> list[bytes]:
        """What the blocks [first, end) of a layer group hold."""
        per_entry = self._sizes[number] // self.hashed_size
        return self._hashes(request, end * per_entry)[(first + 1) * per_entry - 1 : end * per_entry : per_entry]

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Hashes over the request's first runs of `hashed_size` tokens, at least `count` of them."""
        if request.hashed_size != self.hashed_size:  # it was on an executor with other blocks
            request.hashes, request.hashed_size = [], self.hashed_size
        if len(request.hashes) < count:
            extend_hashes(request.hashes, request.cache_salt, request.token_ids, self.hashed_size, count)
        return request.hashes

    # --- forks --------------------------------------------------------------------------------------------------

    def fork(self, parent: Request, child: Request, token_count: int) -> None:
        """Let `child` share the blocks of its parent's first `token_count` tokens, the last one until it writes."""
        tables = []
        for group, table in zip(self.groups, parent.tables, strict=True):
            block_ids = table.block_ids[: group.blocks_for(token_count) - table.first]
            self.pool.share(block_ids)
            tables.append(BlockTable(table.first, block_ids, offered=token_count // group.block_size))
        child.tables = tuple(tables)
        child.shared_tails = tuple(n for n, group in enumerate(self.groups) if token_count % group.block_size)
        child.computed_count = child.planned_count = token_count

    def copy_tails(self, request: Request) -> list[tuple[int, int]]:
        """Give it a block of its own for each that it shares and is about to write; returns (source, copy) pairs."""
        copies: list[tuple[int, int]] = []
        for number in request.shared_tails:
            table = request.tables[number]
            shared = table.block_ids[-1]
            table.block_ids[-1:] = self.pool.take(1)
            self.pool.give_back([shared])
            copies.append((shared, table.block_ids[-1]))
        request.shared_tails = ()
        return copies
