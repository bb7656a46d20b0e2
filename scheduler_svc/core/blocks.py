"""The block pool of one executor: which blocks are held, which are free, which of those can be used again."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

_EMPTY, _REUSABLE, _HELD = 0, 1, 2  # as `BlockPool.picture` shows a block


class BlockPool:
    """The blocks of one executor's cache, interchangeable between the layer groups of its model.

    A block that no block table names is free. A full one whose content was offered stays findable while it is free,
    until the space is needed: blocks without such content go first, then the least recently used, one at a time.

    A freed block may be given away at once: plans run in order on one stream, so whatever an earlier plan still
    writes there is over before the next owner's first write.
    """

    def __init__(self, block_count: int, group_count: int) -> None:
        """Start with all of `block_count` blocks free."""
        self.block_count = block_count
        self._references = [0] * block_count  # block tables that name the block
        self._picture = bytearray(block_count)  # what each block is now, kept so that a look costs no loop over blocks
        self._free = list(range(block_count - 1, -1, -1))  # a stack: block 0 goes first, a warm block goes again
        self._reusable: OrderedDict[int, None] = OrderedDict()  # offered and not held, least recently used first
        self._offered: list[dict[bytes, int]] = [{} for _ in range(group_count)]  # content -> block, by layer group
        self._content: dict[int, tuple[int, bytes]] = {}  # block -> (layer group, content); the inverse

    @property
    def free_count(self) -> int:
        """Blocks that no block table names."""
        return len(self._free) + len(self._reusable)

    @property
    def reusable_count(self) -> int:
        """Free blocks that can still be found by their content."""
        return len(self._reusable)

    def take(self, count: int) -> list[int]:
        """Take `count` of the free blocks for one block table."""
        assert count <= self.free_count, f"{count} blocks wanted, {self.free_count} free"
        references, picture = self._references, self._picture
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            references[block] = 1
            picture[block] = _HELD
            taken.append(block)
        return taken

    def _evict(self) -> int:
        block, _ = self._reusable.popitem(last=False)
        group, content = self._content.pop(block)
        del self._offered[group][content]
        return block

    def claim(self, block_ids: Iterable[int]) -> None:
        """Let block tables name these blocks, as often as each comes, whatever they hold: they do so on the executor
        already. Called once, while all blocks are free.
        """
        for block in block_ids:
            self._references[block] += 1
            self._picture[block] = _HELD
        self._free = [block for block in self._free if not self._references[block]]

    def share(self, block_ids: Iterable[int]) -> None:
        """Let one more block table name these blocks, held or found."""
        for block in block_ids:
            if not self._references[block]:
                del self._reusable[block]
                self._picture[block] = _HELD
            self._references[block] += 1

    def give_back(self, block_ids: Iterable[int]) -> None:
        """One block table fewer names these blocks. The first of them will be evicted first."""
        references, picture = self._references, self._picture
        for block in block_ids:
            references[block] -= 1
            if references[block]:
                continue
            if block in self._content:
                self._reusable[block] = None
                picture[block] = _REUSABLE
            else:
                self._free.append(block)
                picture[block] = _EMPTY

    def offer(self, group: int, content: bytes, block: int) -> None:
        """Make a full block findable. Where another block has the same content already, this one stays private."""
        if self._offered[group].setdefault(content, block) == block:
            self._content[block] = (group, content)

    def offered(self, group: int) -> Mapping[bytes, int]:
        """The block of a layer group that has a content, for each that can be found."""
        return self._offered[group]

    def holder_count(self, block: int) -> int:
        """How many block tables name the block."""
        return self._references[block]

    def picture(self) -> bytes:
        """A byte for each block: 0 holds nothing, 1 can be found by its content, 2 a block table names it."""
        return bytes(self._picture)

    def check_invariants(self, held: Counter[int]) -> None:
        """Hold the pool against the blocks that all block tables name, and how often."""
        counted = Counter({block: count for block, count in enumerate(self._references) if count})
        assert counted == held, "a reference count differs from the tables that name the block"
        free, reusable = set(self._free), set(self._reusable)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & reusable, "a block is free and reusable"
        assert not (free | reusable) & held.keys(), "a block is free and named by a block table"
        assert len(free) + len(reusable) + len(held) == self.block_count, "a block leaked"
        states = ((_EMPTY, free), (_REUSABLE, reusable), (_HELD, held))
        seen = all(self._picture[block] == state for state, blocks in states for block in blocks)
        assert seen, "the picture shows a block as what it is not"
        assert not free & self._content.keys(), "a block without a future is still offered"
        assert reusable <= self._content.keys(), "a reusable block cannot be found"
        offered = {block: (group, key) for group, blocks in enumerate(self._offered) for key, block in blocks.items()}
        assert offered == self._content, "what is offered differs from what the blocks hold"
