"""What the self-test looks at: it is the only judge of a model on the machine that serves it."""

import numpy as np
import pytest

from executor_svc import self_test
from executor_svc.model import ModelError
from executor_svc.native.model import NativeDecoder
from executor_svc.packed_model import PackedModel
from tests.executor_svc.conftest import load_folder

KINDS = (PackedModel, NativeDecoder)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "deepseek_v3"])
def test_mistakes_beyond_the_first_64_keys_are_found(serving_folder, monkeypatch, architecture):
    """Attention walks keys in rounds; a mistake in the second one would show in long requests only."""
    original = self_test._seen_entries

    def one_block_twice(group, table, computed):
        seen = original(group, table, computed)
        entry = 64 // group.block_size
        seen[:, entry] = np.where(computed > 40, seen[:, entry - 1], seen[:, entry])
        return seen

    monkeypatch.setattr(self_test, "_seen_entries", one_block_twice)

    with pytest.raises(ModelError, match="away from those of its plain forward pass"):
        load_folder(serving_folder(architecture))


@pytest.mark.parametrize("context_length", [3, 6, 11, 100])
def test_no_sequence_is_longer_than_the_context(serving_folder, monkeypatch, context_length):
    """Positions that a model was not made for prove nothing, and may not even exist."""
    seen = []
    for kind in KINDS:

        def spy(self, query_lengths, context_lengths, *rest, step=kind.step):
            seen.append(int(max(context_lengths)))
            return step(self, query_lengths, context_lengths, *rest)

        monkeypatch.setattr(kind, "step", spy)
    monkeypatch.setattr("executor_svc.torch_runner.run_largest_step", lambda *_: 0)
    load_folder(serving_folder("gemma2"), max_model_len=context_length)

    assert max(seen) == context_length
