"""Layers that see the same earlier positions, and the block table that a request has in each such group."""

from __future__ import annotations

from dataclasses import dataclass, field

NO_BLOCK = 0xFFFFFFFF
"""Entry of a block table, on the wire, that lies behind what the layers of its group see."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """One kind of attention layer: full, sliding window or chunked.

    A block takes the same memory whichever group holds it, and holds more tokens of a group with fewer layers.
    """

    block_size: int  # tokens
    window: int = 0  # a position sees the last `window` ones, its own included; 0: all
    chunk: int = 0  # a position sees only those of its own chunk of this many; 0: all

    @property
    def sees_all(self) -> bool:
        """Whether every position sees all earlier ones."""
        return not self.window and not self.chunk

    def blocks_for(self, token_count: int) -> int:
        """Blocks that `token_count` tokens fill, the last one perhaps in part."""
        return -(-token_count // self.block_size)

    def first_block(self, position: int) -> int:
        """The first block that this position, or any later one, still sees.

        Example: with blocks of 4 and a window of 6, position 13 sees 8 to 13: blocks 0 and 1 have slid out.
        """
        first = 0
        if self.window:
            first = max(0, position - self.window + 1)
        if self.chunk:
            first = max(first, position // self.chunk * self.chunk)
        return first // self.block_size

    def most_blocks(self, token_count: int, lag: int) -> int:
        """Blocks that a request of `token_count` tokens holds at most, when they are given back `lag` tokens late.

        Any run of n positions touches at most ceil((n - 1) / block size) + 1 blocks.
        """
        needed = self.blocks_for(token_count)
        if self.sees_all:
            return needed
        span = min(size for size in (self.window, self.chunk) if size) + lag
        return min(needed, self.blocks_for(span - 1) + 1)


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request in one layer group, in the order of its tokens."""

    first: int = 0  # entries before this one have slid out of what the group sees, and hold no block
    block_ids: list[int] = field(default_factory=list)  # entries [first, end)
    offered: int = 0  # entries before this one were offered for reuse, or came from there

    @property
    def end(self) -> int:
        """Entries, those that hold no block any more included."""
        return self.first + len(self.block_ids)

    def slide(self, first: int) -> list[int]:
        """Drop the entries before `first`; returns the blocks that they held."""
        count = max(0, min(first, self.end) - self.first)
        dropped = self.block_ids[:count]
        del self.block_ids[:count]
        self.first += count
        return dropped

    def entries(self) -> tuple[int, ...]:
        """The whole table as the executor has it."""
        return (NO_BLOCK,) * self.first + tuple(self.block_ids)
