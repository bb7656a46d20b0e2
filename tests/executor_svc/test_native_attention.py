"""Attention in C++ where it goes other ways: rows that begin alike together, a long context in parts."""

import numpy as np
import pytest
import torch

from executor_svc.kv_cache import PagedPool
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.tiny_models import save_serving_folder

pytestmark = needs_compiler

BLOCK_SIZE = 4


class Steps:
    """Steps of a tiny model over a pool of its own, whose tokens follow from their position and a seed."""

    def __init__(self, folder, threads, block_count):
        self.steps = load_folder(folder, threads=threads)._model
        geometry = self.steps.traits.geometry(BLOCK_SIZE)
        (group,) = geometry.groups
        assert group.block_size == BLOCK_SIZE
        self.pool = PagedPool(geometry, block_count, self.steps.traits.cache_dtype, torch.device("cpu"))

    def run(self, rows):
        """The last logits of each row: (tokens, how many of them are computed now, block table)."""
        width = max(len(table) for _, _, table in rows)
        tables = np.zeros((len(rows), width), np.int32)
        for row, (_, _, table) in zip(tables, rows, strict=True):
            row[: len(table)] = table
        counts = np.array([count for _, count, _ in rows])
        contexts = np.array([len(tokens) for tokens, _, _ in rows])
        token_ids = torch.tensor([token for tokens, count, _ in rows for token in tokens[-count:]])
        last = torch.from_numpy(counts.cumsum() - 1)
        with torch.inference_mode():
            return self.steps.step(counts, contexts, [tables], token_ids, self.pool, last).clone()


def tokens(count, seed):
    return [(position * 7919 + seed * 104729) % 320 for position in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("shared_count", [64, 132])
def test_rows_that_begin_alike_compute_what_each_computes_alone(tmp_path, architecture, shared_count):
    """Requests with one system prompt are the usual load; what they save must not show in an answer."""
    begin = tokens(shared_count, 0)
    shared = list(range(shared_count // BLOCK_SIZE))
    model = Steps(save_serving_folder(architecture, tmp_path), 1, 200)
    model.run([(begin, shared_count, shared)])
    rows, free = [], iter(range(199, 100, -1))
    for number, own_count in enumerate((1, 2, 5, 9, 1, 70, 3, 4)):
        own = [next(free) for _ in range(-(-(own_count + 1) // BLOCK_SIZE))]
        row = begin + tokens(own_count, number + 1)
        model.run([(row, own_count, shared + own)])
        rows.append(([*row, number], 1, shared + own))
    rows.insert(3, (tokens(9, 50)[:1], 1, [100]))  # a stranger among them

    alone = torch.cat([model.run([row]) for row in rows])

    assert torch.allclose(model.run(rows), alone, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("threads", [2, 4])
def test_a_context_in_parts_computes_what_it_computes_whole(tmp_path, architecture, threads):
    """One long conversation must keep all cores busy, and get the same answer."""
    folder = save_serving_folder(architecture, tmp_path, max_position_embeddings=4096)
    prompt, table = tokens(1300, 0), list(range(1304 // BLOCK_SIZE))[::-1]
    logits = []
    for count in (1, threads):
        model = Steps(folder, count, len(table))
        model.run([(prompt, len(prompt), table)])
        logits.append(model.run([([*prompt, 5], 1, table)]))

    assert torch.allclose(*logits, atol=1e-4)


def test_the_likeliest_token_is_the_first_of_equal_ones_and_nan_shows(tmp_path):
    """It is found in C++ beside the logits; torch's own search is what it must agree with."""
    model = Steps(save_serving_folder("llama", tmp_path), 1, 8)
    logits = model.run([(tokens(7, 1), 7, [0, 1])])
    best, token = model.steps.likeliest(logits)

    assert best.tolist() == logits.max(dim=-1).values.tolist()
    assert token.tolist() == logits.argmax(dim=-1).tolist()

    for plane in model.pool.planes:
        plane.fill_(torch.nan)
    best, _ = model.steps.likeliest(model.run([(tokens(8, 1), 1, [0, 1])]))

    assert best.isnan().all()
