"""Compiles kernels for a GPU that need not be there, and tells what each of them takes of it.

    python -m tests.executor_svc.gpu.compile_kernels 90        # for compute capability 9.0, one JSON object a line

Run without TRITON_INTERPRET. Launchers compile what they would launch, with the arguments it would be launched with.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import KeySource
from executor_svc.batch import LayerGroup
from executor_svc.gpu import attention
from executor_svc.gpu.inputs import inputs_of
from executor_svc.layer_groups import FULL, Visibility
from tests.executor_svc.gpu.variants import compile_variants

SHARED_BYTES = {80: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # 8.0 has 163 KB; 8.6 and 8.9, compiled alike, have 99


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes."""

    name: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread: registers that were spilled
    shared_bytes: int  # of a program


@dataclass(frozen=True)
class _NoDevice:
    """What Triton asks about the current device before it compiles."""

    capability: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int) -> dict[str, Any]:
    """From here on, launches in this process compile; the dictionary has what they compiled, by hash."""
    compiled = {}

    def launcher(kernel: JITFunction, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made = kernel.run(*arguments, grid=grid, warmup=True, **options)
            compiled[made.hash] = made

        return launch

    driver.set_active(_NoDevice(capability))
    JITFunction.__getitem__ = launcher
    attention.shared_memory = lambda device: SHARED_BYTES[capability]
    return compiled


def used_by(name: str, kernel: Any) -> Compiled:
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(name, registers, stack, kernel.metadata.shared)


@dataclass(frozen=True)
class Attention:
    """Attention of one model's layers."""

    name: str
    group_size: int
    key_dim: int
    value_dim: int
    key_heads: int = 2
    visibility: Visibility = FULL
    softcap: float = 0.0
    has_sinks: bool = False

    def launch(self, query_lengths: list[int], context_lengths: list[int], offset: int = 0) -> None:
        """Store and attend; tensors of the step begin `offset` numbers behind where memory is aligned."""
        token_count, head_count = sum(query_lengths), self.key_heads * self.group_size
        contexts = np.array(context_lengths)
        inputs = inputs_of(
            np.array(query_lengths),
            contexts,
            [np.zeros((len(contexts), contexts.max() // 16 + 1), dtype=np.int32)],
            torch.zeros(token_count),
            torch.zeros(0),
            (LayerGroup(16),),
            torch.device("cpu"),
        )
        for field in ("positions", "rows", "row_starts", "contexts", "tables"):
            moved = torch.nn.functional.pad(getattr(inputs, field), (offset, 0))[offset:]
            object.__setattr__(inputs, field, moved)
        query = torch.empty(token_count, head_count, self.key_dim, dtype=torch.bfloat16).transpose(0, 1)
        keys = torch.empty(64, self.key_heads, self.key_dim, dtype=torch.bfloat16)
        values = torch.empty(64, self.key_heads, self.value_dim, dtype=torch.bfloat16)
        value = torch.empty(token_count, self.key_heads, self.value_dim, dtype=torch.bfloat16).transpose(0, 1)
        source = KeySource(0, self.visibility, self.key_heads, 16, 16)
        rule = ScoreRule(0.1, self.softcap, torch.zeros(head_count) if self.has_sinks else None)
        attention.store(query[: self.key_heads], value, keys, values, inputs, source)
        attention.attend(query, keys, values, inputs, source, rule, core_count=132)


ATTENTIONS = [
    Attention("Llama's", group_size=4, key_dim=128, value_dim=128),
    Attention("Gemma 2's", group_size=2, key_dim=256, value_dim=256, softcap=50.0),
    Attention("GPT-OSS's", group_size=8, key_dim=64, value_dim=64, visibility=Visibility(window=128), has_sinks=True),
]
WIDEST = Attention("the widest", group_size=3, key_dim=512, value_dim=512)


def main() -> None:
    """Compile every kernel that matters."""
    capability = int(sys.argv[1])
    kernels = compile_only(capability)
    for layer in [*ATTENTIONS, WIDEST] if SHARED_BYTES[capability] < 100 << 10 else ATTENTIONS:
        kernels.clear()
        layer.launch([1, 9], [8, 9])
        first = list(kernels.values())
        layer.launch([1, 1], [700, 900], offset=1)
        layer.launch([1, 37, 16], [160, 64, 16], offset=3)
        assert len(kernels) == len(first), (
            f"other rows compiled {[kernel.metadata.name for kernel in kernels.values()]}"
        )
        for kernel in first:
            print(json.dumps(asdict(used_by(f"{kernel.metadata.name}, {layer.name}", kernel))))
    for variant in compile_variants():
        source = ASTSource(variant.fn, variant.signature, variant.constexprs)
        options = {"num_warps": variant.num_warps, "enable_fp_fusion": True}
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(json.dumps(asdict(used_by(variant.name, kernel))))


if __name__ == "__main__":
    main()
