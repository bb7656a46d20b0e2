"""What rounding costs, measured on a tiny model."""

import torch

from benchmarks.rounding import PIECE, compare
from tests.executor_svc.conftest import needs_compiler
from tests.tiny_models import VOCABULARY_SIZE, save_serving_folder


@needs_compiler
def test_rounding_is_told_from_none(tmp_path):
    """Figures by which somebody decides for int8: the first row must be exact, the others must not be."""
    folder = str(save_serving_folder("llama", tmp_path, head_dim=32))
    table = compare(folder, [torch.arange(PIECE) * 7919 % VOCABULARY_SIZE])
    names, _, differences, _, same = (list(column.cells) for column in table.columns)

    assert (names[0], differences[0], same[0]) == ("float32", "0.000", "100.0%")
    assert names[-1].endswith("with int8 weights")
    assert all(float(difference) > 0 for difference in differences[1:])
