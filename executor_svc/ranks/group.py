"""The ranks of an executor as torch and transformers see them: which model they can share, and how they speak."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from executor_svc.config import ExecutorConfig
from executor_svc.machine import usable_core_count
from executor_svc.model import ModelError, choose_device, load_config, open_folder

_LOAD_TIMEOUT = timedelta(hours=1)  # one rank may read its part of a large model much later than another one
_HOST = "127.0.0.1"
_Store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not declare it where it is documented


@dataclass(frozen=True, slots=True)
class RankGroup:
    """One rank's way to the others."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, rank: int, size: int, device: torch.device, meeting: Any) -> RankGroup:
        """Meet the others; returns when all are there."""
        os.environ["LOCAL_RANK"] = str(rank)  # where transformers looks for the number of its GPU
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(device)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody outside this host takes part
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=meeting,
            rank=rank,
            world_size=size,
            timeout=_LOAD_TIMEOUT,
            device_id=device if is_gpu else None,
        )
        return cls(rank, size, device)

    def least(self, count: int) -> int:
        """The least of what the ranks say; all of them have to ask."""
        told = torch.tensor(count, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return int(told)

    def leave(self) -> None:
        """End what there is of the group in this process."""
        dist.destroy_process_group()
        os.environ.pop("LOCAL_RANK", None)


def open_meeting(size: int) -> Any:
    """Where rank 0 waits for the others: a port that only this host reaches."""
    listening = socket.create_server((_HOST, 0), backlog=size)
    port = listening.getsockname()[1]
    return _Store(
        _HOST, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach(), use_libuv=True
    )


def find_meeting(port: int, size: int) -> Any:
    """The same, for the others."""
    return _Store(_HOST, port, size, is_master=False)


def config_of_rank(config: ExecutorConfig, rank: int) -> ExecutorConfig:
    """The settings with which one rank loads its part of the model.

    All ranks have to do the same in the same order: so none of them uses what an earlier start has kept.
    """
    device = choose_device(config.device)
    if device.type == "cuda":
        return replace(config, device=f"cuda:{rank}", native=False, graphs=False, keep_checks=False)
    threads = max(1, (config.threads or usable_core_count()) // config.tensor_parallel)
    return replace(config, device="cpu", threads=threads, native=False, graphs=False, keep_checks=False)


def check_shared(config: ExecutorConfig) -> None:
    """Refuse what ranks cannot share, before any of them is started. Raises `ModelError`."""
    size = config.tensor_parallel
    gpu_count = _usable_gpu_count(config)
    folder = open_folder(config.model)
    model = load_config(folder.path)
    name = model.model_type
    if getattr(model, "quantization_config", None):
        raise ModelError(
            f"{name!r} in '{folder.path}' has quantised weights, which tensor parallel cannot divide; "
            "choose the model in its own type, or set tensor_parallel to 1"
        )
    text = model.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"transformers has no tensor parallel plan for the layers of {name!r}; "
            "set tensor_parallel to 1 or choose another model"
        )
    query_heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or query_heads
    if query_heads % size or key_heads % size:
        most = min(gpu_count or size, math.gcd(query_heads, key_heads))
        fitting = [count for count in range(1, most + 1) if not query_heads % count and not key_heads % count]
        raise ModelError(
            f"{size} ranks cannot share {query_heads} query heads and {key_heads} key heads: "
            f"{query_heads} / {size} = {query_heads / size:g}, {key_heads} / {size} = {key_heads / size:g}; "
            f"set tensor_parallel to {' or '.join(map(str, fitting))}"
            + (f" (this process sees {gpu_count} GPUs)" if gpu_count else "")
        )


def _usable_gpu_count(config: ExecutorConfig) -> int:
    """GPUs for the ranks to have; 0 where they compute on the CPU."""
    size, gpu_count = config.tensor_parallel, torch.cuda.device_count()
    device = choose_device(config.device)
    if device.index is not None:
        raise ModelError(
            f"tensor parallel {size} takes the GPUs 0 to {size - 1} of those that this process sees, "
            f"but device is {config.device!r}; leave it at 'auto' and choose them with CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cpu":
        if gpu_count:  # transformers divides a model between GPUs wherever there are any
            raise ModelError(
                f"tensor parallel on the CPU, but this process sees {gpu_count} GPUs; "
                "leave device at 'auto', or hide them with an empty CUDA_VISIBLE_DEVICES"
            )
        if config.device == "auto":
            raise ModelError(
                f"tensor parallel {size} needs {size} GPUs, but this process sees none; install a CUDA build of torch, "
                "or say device 'cpu' to try it out there"
            )
        return 0
    if gpu_count < size:
        raise ModelError(
            f"tensor parallel {size} needs {size} GPUs, but this process sees {gpu_count}; "
            f"set tensor_parallel to {gpu_count} or less, or give it more with CUDA_VISIBLE_DEVICES"
        )
    return gpu_count
