"""Comparing tokens with those of a reference: equal, but where two candidates are as good as each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TIE_MARGIN = 1e-4  # logits closer than this may change places: prefill and decode shapes differ by about 1e-6
TIES_ALLOWED = 1e-4  # of all compared tokens


@dataclass(slots=True)
class ParityCounter:
    """Tokens compared and ties met in this process; a session fixture checks it at the end."""

    token_count: int = 0
    tie_count: int = 0

    def check(self) -> None:
        """Fail when ties are more than chance brings: then something computes less exactly than it should."""
        allowed = max(1.0, self.token_count * TIES_ALLOWED)
        assert self.tie_count <= allowed, f"{self.tie_count} ties in {self.token_count} tokens, allowed {allowed:g}"


counter = ParityCounter()


def assert_same_tokens(
    model: Any, prompt_ids: Sequence[int], expected_ids: Sequence[int], actual_ids: Sequence[int]
) -> None:
    """Assert that the outputs are equal up to their first tie, judged by a float32 forward pass of `model`.

    After a tie the two texts go their own ways, so what follows it is not compared.
    """
    expected, actual = list(expected_ids), list(actual_ids)
    counter.token_count += len(expected)
    if expected == actual:
        return
    pairs = zip(expected, actual, strict=False)
    index = next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(expected), len(actual)))
    assert index < min(len(expected), len(actual)), (
        f"one output ends after {index} tokens where the other goes on: expected {expected}, got {actual}"
    )
    margin = _margin(model, [*prompt_ids, *expected[:index]], expected[index], actual[index])
    assert margin < TIE_MARGIN, (
        f"output token {index} is {actual[index]}, expected {expected[index]}, and their logits differ by {margin:.3g}"
    )
    counter.tie_count += 1


def _margin(model: Any, token_ids: Sequence[int], expected: int, actual: int) -> float:
    assert model.dtype == torch.float32, "only a float32 reference can tell a tie"
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False).logits[0, -1]
    return abs(float(logits[expected] - logits[actual]))
