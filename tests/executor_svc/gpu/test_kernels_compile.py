"""Kernels are compiled for GPUs that are not there: what the interpreter takes may still not fit."""

import json
import os
import subprocess
import sys

import pytest

from tests.executor_svc.gpu.compile_kernels import SHARED_BYTES, Compiled


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_fits_the_device_without_spilling(capability, tmp_path):
    """Too large a tile fails at the first step, one that spills is slow, and what is compiled anew for other rows
    stops every stream for a second.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.executor_svc.gpu.compile_kernels", str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]

    assert len({kernel.name for kernel in kernels}) > 20
    assert [kernel for kernel in kernels if kernel.stack_bytes] == []
    assert [kernel for kernel in kernels if kernel.shared_bytes > SHARED_BYTES[capability]] == []
