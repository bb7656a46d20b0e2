"""Several executors on one GPU: how each finds out what it may take."""

import fcntl
from types import SimpleNamespace

import pytest
import torch

from executor_svc.sizing import device_cache_budget
from executor_svc.sole_start import sole_start

GPU = torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def lock_file(tmp_path, monkeypatch):
    """Where starts on the GPU are kept apart, as if there were one."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="one"))
    return tmp_path / "starts/one.lock"


def is_locked(path) -> bool:
    """Whether an executor that started now would wait."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_others_wait_until_a_start_is_over(lock_file):
    """Two that measure at once each take the other's weights and cache for their own, and the second has none."""
    with sole_start(GPU, lambda *_told: None):
        assert is_locked(lock_file)

    assert not is_locked(lock_file)


def test_a_start_that_fails_lets_the_next_one_go_on(lock_file):
    """`paceline serve` starts an executor again; it must not wait for itself."""
    with pytest.raises(MemoryError), sole_start(GPU, lambda *_told: None):
        raise MemoryError

    assert not is_locked(lock_file)


def test_who_waits_says_so(lock_file):
    """A start that stands still without a word looks like one that hangs."""
    lock_file.parent.mkdir()
    with lock_file.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def let_go(phase: str, _share: float) -> None:
            phases.append(phase)
            fcntl.flock(other, fcntl.LOCK_UN)

        phases: list[str] = []
        with sole_start(GPU, let_go):
            assert is_locked(lock_file)

    assert phases == ["waiting for another executor that starts on this GPU"]


def test_a_place_that_cannot_be_written_keeps_nobody_from_starting(lock_file):
    """Who starts alone needs no lock."""
    lock_file.parent.write_text("no folder")

    with sole_start(GPU, lambda *_told: None):
        pass


@pytest.mark.parametrize(
    ("free", "taken_at_start", "utilization", "budget"),
    [
        (60, 0, 0.9, 72 - 20.5 - 2),  # alone: 20 are loaded, and the context is reckoned beside them
        (30, 30, 0.45, 36 - 20.5 - 2),  # what a neighbour had taken before does not count as its own
        (10, 50, 0.9, 10 - 2),  # but nobody can have more than what is free
        (5, 0, 0.9, 0),  # and never less than nothing
    ],
)
def test_the_cache_is_what_the_share_of_a_gpu_leaves(monkeypatch, free, taken_at_start, utilization, budget):
    """Weights, the largest step and the cache together keep to the share, whoever else is on the GPU."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free * GIB, 80 * GIB))

    given = device_cache_budget(GPU, utilization, taken_at_start * GIB, 2 * GIB)

    assert given == pytest.approx(budget * GIB, abs=1)
