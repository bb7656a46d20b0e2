"""Memory that is given back."""

import mmap

import torch

from executor_svc.memory import forget, trim

_COUNT = 4 * mmap.PAGESIZE


def test_what_is_forgotten_is_given_back_whole():
    """All pages but the two at the ends, which it may share with others."""
    whole = torch.ones(_COUNT)
    before, tensor, after = whole.split([100, _COUNT - 200, 100])
    forget(tensor)

    assert int(tensor.count_nonzero()) < 2 * mmap.PAGESIZE / 4
    assert int(before.count_nonzero()) == int(after.count_nonzero()) == 100


def test_giving_back_changes_nothing_that_is_in_use():
    """It is called while a model is there."""
    tensor = torch.arange(_COUNT)
    trim()

    assert torch.equal(tensor, torch.arange(_COUNT))
