"""Kernels that are interpreted take milliseconds for what takes a GPU none: everything here is small."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="package")
def short_self_test() -> Iterator[None]:
    """A start tests fewer tokens; the tests themselves compare with transformers. Those of other packages must not."""
    schedule = ((5, 4), (3, 1), (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("executor_svc.self_test._SCHEDULE", schedule)
        patch.setattr("executor_svc.self_test._LENGTHS", tuple(map(sum, zip(*schedule, strict=True))))
        yield


@pytest.fixture(autouse=True, scope="package")
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter prepares its language anew for every function that a kernel calls: most of its time."""
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    active: list[_Scopes] = []

    def prepare_once(function: Callable) -> _Scopes:
        if active:
            return _Scopes([], [])
        # The kernel's own module names the whole language, the standard library only its core.
        active.append(_Scopes([prepare(function), prepare(triton.language.standard.cdiv.fn)], active))
        return active[0]

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))  # the other half
        yield


@dataclass
class _Scopes:
    """What was prepared for one launch."""

    scopes: list[Any]
    active: list[Any]

    def restore(self) -> None:
        for scope in reversed(self.scopes):
            scope.restore()
        self.active.clear()
