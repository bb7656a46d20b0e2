"""What a block holds, as a hash of everything that decided it."""

from array import array
from hashlib import blake2b

_SIZE = 16
"""Bytes of a hash: two of 2**40 blocks are equal by chance with a probability of 2**-49."""


def extend_hashes(hashes: list[bytes], salt: str, token_ids: "array[int]", block_size: int, count: int) -> None:
    """Bring `hashes` to `count` entries, those of the first full blocks of `block_size` tokens.

    Entry i covers the salt and all tokens up to the end of block i, so that equal hashes mean equal keys and values:
    what a layer keeps of a token depends on all tokens before it. The salt goes in first, so that no two salts
    ever meet.
    """
    start = len(hashes)
    parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=_SIZE).digest()
    data = token_ids[start * block_size : count * block_size].tobytes()
    width = block_size * token_ids.itemsize
    for offset in range(0, len(data), width):
        parent = blake2b(parent + data[offset : offset + width], digest_size=_SIZE).digest()
        hashes.append(parent)
