"""What computes attention, and what is said where it cannot be had."""

import builtins

import pytest
import torch

from executor_svc.gpu.triton_attention import TritonAttention
from executor_svc.model import ModelError
from executor_svc.torch_runner import paged_attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one; returns a function that says which."""

    def pretend(capability: tuple[int, int], name: str = "NVIDIA A100") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
        properties = type("Properties", (), {"multi_processor_count": 108})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)

    return pretend


def test_a_cpu_is_left_to_torch():
    """Interpreted kernels are for trying them out, not for serving."""
    assert paged_attention("auto", CPU) is None
    assert paged_attention("torch", CPU) is None


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_gets_our_kernels(gpu, name):
    """Nobody should have to know which attention to choose."""
    gpu((8, 0))

    assert isinstance(paged_attention(name, GPU), TritonAttention)
    assert paged_attention("torch", GPU) is None


def test_a_gpu_that_is_too_old_is_told_so(gpu):
    """Kernels would fail to compile there, with pages of text that say nothing to an operator."""
    gpu((7, 5), "Tesla T4")

    with pytest.raises(ModelError, match=r"8\.0 \(Ampere\) or later and Tesla T4 has 7\.5; choose --attention torch"):
        paged_attention("auto", GPU)


def test_kernels_are_refused_on_a_cpu_unless_they_are_to_be_interpreted(monkeypatch):
    """A hundredfold slower service must be somebody's wish, not an accident."""
    monkeypatch.delenv("TRITON_INTERPRET")

    with pytest.raises(ModelError, match="attention 'triton' needs a GPU, and the device is a CPU"):
        paged_attention("triton", CPU)


def test_missing_triton_is_named(gpu, monkeypatch):
    """Builds of torch without it exist."""
    gpu((9, 0))
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("executor_svc.gpu.triton_attention"):
            raise ImportError("No module named 'triton'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)

    with pytest.raises(ModelError, match=r"needs Triton, which is not installed.*choose --attention torch"):
        paged_attention("auto", GPU)
