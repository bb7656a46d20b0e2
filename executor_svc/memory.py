"""Memory of the host: large pages for weights, and giving back what an allocator or a mapped file would keep."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch

LINE_BYTES = 64
_DONT_NEED = 4  # MADV_DONTNEED
_LARGE_PAGE_BYTES = 2 << 20
_ARENA_BYTES = 32 << 20


class Arena:
    """Memory for what every step reads from beginning to end, in large pages where the system has them."""

    def __init__(self) -> None:
        """Take nothing yet."""
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, byte_count: int) -> torch.Tensor:
        """So many bytes, which begin where a line of the processor's cache does; `[bytes]` uint8."""
        wanted = -(-byte_count // LINE_BYTES) * LINE_BYTES
        if wanted > _ARENA_BYTES:
            return _large_pages(wanted)[:byte_count]
        if wanted > len(self._rest):
            self._rest = _large_pages(_ARENA_BYTES)
        taken, self._rest = self._rest.tensor_split([wanted])
        return taken[:byte_count]


def _large_pages(byte_count: int) -> torch.Tensor:
    """Bytes that take memory once they are written; numpy asks the system for large pages for so many."""
    untouched = np.empty(byte_count + _LARGE_PAGE_BYTES, dtype=np.uint8)
    start = -untouched.ctypes.data % _LARGE_PAGE_BYTES
    return torch.from_numpy(untouched)[start : start + byte_count]


def forget(tensor: torch.Tensor) -> None:
    """Give the memory of `tensor`, which nobody reads any more, back at once: it becomes zeros, or is read again.

    Freeing alone does not: what came in small pieces, or from another thread, stays with the allocator.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise and start < end:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def trim() -> None:
    """Give back what has been freed, where the allocator can."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
