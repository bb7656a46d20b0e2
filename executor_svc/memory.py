"""Giving memory back to the system: what an allocator or a mapped file would keep resident."""

from __future__ import annotations

import ctypes
import mmap

import torch

_DONT_NEED = 4  # MADV_DONTNEED


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
