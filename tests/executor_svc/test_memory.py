"""Memory that is given back."""

import mmap

import torch

from executor_svc.memory import forget, trim

_COUNT = 4 * mmap.PAGESIZE


def test_what_is_forgotten_is_given_back_whole():
    """All pages but the two at the ends, which it may share with others."""
    tensor = torch.ones(_COUNT)
    neighbours = tensor[:1].clone(), tensor[-1:].clone()
    forget(tensor)

    assert int(tensor.count_nonzero()) < 2 * mmap.PAGESIZE / 4
    assert all(int(neighbour) == 1 for neighbour in neighbours)


def test_giving_back_changes_nothing_that_is_in_use():
    """It is called while a model is there."""
    tensor = torch.arange(_COUNT)
    trim()

    assert torch.equal(tensor, torch.arange(_COUNT))
