"""Memory that is given back."""

import mmap
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from executor_svc.memory import forget, trim
from executor_svc.model import _memory_for_each_weight

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


def test_transformers_does_not_take_the_memory_of_all_weights_in_one_piece(serving_folder, monkeypatch):
    """Of such a piece a GPU gets nothing back when fused steps let matrices go: the cache would be so much smaller."""

    def take(*_: object) -> None:
        raise RuntimeError("taken in one piece")

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", take)
    load = partial(AutoModelForCausalLM.from_pretrained, serving_folder("llama"), device_map={"": "cpu"})
    with _memory_for_each_weight():
        load()

    with pytest.raises(RuntimeError, match="in one piece"):  # else it has another name by now
        load()
