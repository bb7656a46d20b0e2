"""The block pool of one executor."""

from collections.abc import Sequence


def blocks_for(token_count: int, block_size: int) -> int:
    """Blocks that `token_count` tokens fill, the last one perhaps in part."""
    return -(-token_count // block_size)


class BlockPool:
    """The blocks of one executor's cache: which are free.

    A freed block may be given away at once: plans run in order on one stream, so whatever an earlier plan still
    writes there is over before the next owner's first write.
    """

    def __init__(self, block_count: int, block_size: int) -> None:
        """Start with all of `block_count` blocks of `block_size` tokens free."""
        self.block_count = block_count
        self.block_size = block_size
        self._free = list(range(block_count - 1, -1, -1))  # a stack: block 0 goes first, a warm block goes again

    @property
    def free_count(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` of the free blocks."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, block_ids: Sequence[int]) -> None:
        """Return blocks that were taken."""
        self._free.extend(reversed(block_ids))

    def check_invariants(self, held: Sequence[int]) -> None:
        """Hold the pool against the blocks that all block tables name."""
        assert len(set(held)) == len(held), "two block tables name one block"
        assert not set(held) & set(self._free), "a block is free and named by a block table"
        assert len(held) + len(self._free) == self.block_count, "a block leaked"
