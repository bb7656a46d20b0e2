"""Memory that is given back."""

import mmap

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


def test_memory_that_transformers_takes_for_all_weights_is_given_back_before_they_come(serving_folder, monkeypatch):
    """Of one piece a GPU gets nothing back when fused steps let matrices go: the cache would be so much smaller."""
    done = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: done.append("taken"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))
    with _memory_for_each_weight():
        AutoModelForCausalLM.from_pretrained(serving_folder("llama"), device_map={"": "cpu"})

    assert done == ["taken", "given back"]
