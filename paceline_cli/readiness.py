"""Whether a server takes requests yet, and what to say when it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from paceline_cli.scaling import ExecutorRange

if TYPE_CHECKING:
    from paceline.v1.fleet_pb2 import ExecutorCapacity

_DEFAULT_PORT = ":50051"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served, for people."""

    name: str
    context_length: int  # 0: not known before the first executor
    executor_count: int
    has_chat_template: bool
    cache_token_count: int = 0  # in the cache of the executor that has the smallest; 0: not known, as above


class ReadinessProbe:
    """Asks the scheduler whether it serves and enough executors have joined."""

    def __init__(self, address: str, least_count: int = 1) -> None:
        """Ask at `address`. With a `least_count` of 0 an autoscaler will do: requests wait for an executor then."""
        import grpc

        from paceline.v1.fleet_pb2_grpc import FleetServiceStub
        from paceline.v1.inference_pb2_grpc import InferenceServiceStub

        # The server is expected any moment: look for it often.
        options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300)]
        self._least_count = min(1, least_count)  # the first one makes it ready; the others may come later
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = InferenceServiceStub(self._channel)
        self._fleet = FleetServiceStub(self._channel)

    def __enter__(self) -> ReadinessProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def look(self, timeout_s: float = 1.0) -> ServedModel | None:
        """What is served; None while there is nobody to serve it."""
        import grpc

        from paceline.v1.fleet_pb2 import ListExecutorsRequest
        from paceline.v1.inference_pb2 import GetModelRequest

        try:
            model = self._stub.GetModel(GetModelRequest(), timeout=timeout_s).model
            fleet = self._fleet.ListExecutors(ListExecutorsRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None
        if model.executor_count < self._least_count or not (model.executor_count or fleet.scaling_holder_id):
            return None  # without an autoscaler nobody would hold a request
        caches = [cache_token_count(executor.capacity) for executor in fleet.executors]
        return ServedModel(
            model.name, model.context_length, model.executor_count, model.has_chat_template, min(caches, default=0)
        )


def cache_token_count(capacity: ExecutorCapacity) -> int:
    """Tokens whose keys and values fit into the cache of one executor. Of a model with windows more may: what no later
    token sees is given back.

    Example: 300 blocks; in a block fit 16 tokens of one layer group, or 32 of the other. 32 tokens take 2 blocks and 1,
    so 3,200 tokens fit.
    """
    blocks_per_token = sum(1 / group.block_size for group in capacity.layer_groups if group.block_size)
    return int(capacity.block_count / blocks_per_token + 1e-6) if blocks_per_token else 0


def print_ready(console: Console, served: ServedModel, address: str, wanted: ExecutorRange, page: str = "") -> None:
    """One line with the address, then how to talk to it."""
    limits = [f"{served.context_length:,} tokens of context"] if served.context_length else []
    if served.cache_token_count:
        limits.append(f"cache: {served.cache_token_count:,} tokens{'' if wanted.max_count == 1 else ' each'}")
    if wanted.is_fixed:
        executors = str(wanted) if wanted.max_count == 1 else f"{served.executor_count} of {wanted}"
    else:
        executors = f"{wanted}, {served.executor_count} now"
    facts = " · ".join([served.name, *limits, executors])
    console.print(f"[bold green]Paceline is ready at {address}[/]  [dim]{escape(facts)}[/]")
    if page:
        console.print(f"[dim]status page[/] [cyan]{page}[/]")
    server = "" if address.endswith(_DEFAULT_PORT) else f" --server {address}"
    verb = "chat" if served.has_chat_template else "generate 'The capital of France is'"
    console.print(f"""
  [cyan]paceline {verb}{server}[/]

  [cyan]from paceline import Client
  with Client("{address}") as client:
      for chunk in client.generate("The capital of France is", max_output_tokens=16):
          print(chunk.text, end="", flush=True)[/]

  [dim]Ctrl-C stops it.[/]
""")
