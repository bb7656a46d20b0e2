"""Attention in C++ where it goes other ways: rows that begin alike together, a long context in parts."""

import numpy as np
import pytest
import torch

from executor_svc.batch import NO_BLOCK
from executor_svc.kv_cache import PagedPool
from tests.executor_svc.conftest import load_folder, needs_compiler
from tests.tiny_models import save_serving_folder

pytestmark = needs_compiler

BLOCK_SIZE = 4


class Steps:
    """Steps of a tiny model over a pool of its own. Rows have one table of blocks of `BLOCK_SIZE` tokens, from which
    those of all layer groups follow: each group has blocks of its own.
    """

    def __init__(self, folder, threads, block_count, dtype="float32"):
        self.steps = load_folder(folder, threads=threads, dtype=dtype)._model
        geometry = self.steps.traits.geometry(BLOCK_SIZE)
        self.groups, self.block_count = geometry.groups, block_count
        pool_size = block_count * len(geometry.groups)
        self.pool = PagedPool(geometry, pool_size, self.steps.traits.cache_dtype, torch.device("cpu"))

    def tables(self, rows):
        """By layer group; what lies behind a window is not there any more."""
        tables = []
        for number, group in enumerate(self.groups):
            per_block = group.block_size // BLOCK_SIZE
            width = max(-(-len(table) // per_block) for _, _, table in rows)
            tables.append(np.zeros((len(rows), width), np.int32))
            for row, (tokens, count, table) in zip(tables[-1], rows, strict=True):
                own = np.array(table[::per_block]) + number * self.block_count
                first = int(group.first_seen(np.array([len(tokens) - count]))[0]) // group.block_size
                row[: len(own)] = np.where(np.arange(len(own)) < first, NO_BLOCK, own)
        return tables

    def run(self, rows):
        """The last logits of each row: (tokens, how many of them are computed now, block table)."""
        counts = np.array([count for _, count, _ in rows])
        contexts = np.array([len(tokens) for tokens, _, _ in rows])
        token_ids = torch.tensor([token for tokens, count, _ in rows for token in tokens[-count:]])
        last = torch.from_numpy(counts.cumsum() - 1)
        with torch.inference_mode():
            return self.steps.step(counts, contexts, self.tables(rows), token_ids, self.pool, last).clone()


def tokens(count, seed):
    return [(position * 7919 + seed * 104729) % 320 for position in range(count)]


# Windows in some layers only: two layer groups.
MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("mistral", {}), ("qwen3", {}), ("qwen3", MIXED), ("gemma2", {})],
    ids=str,
)
@pytest.mark.parametrize("shared_count", [64, 136])
def test_rows_that_begin_alike_compute_what_each_computes_alone(tmp_path, architecture, changes, shared_count):
    """Requests with one system prompt are the usual load; what they save must not show in an answer."""
    begin = tokens(shared_count, 0)
    shared = list(range(shared_count // BLOCK_SIZE))
    model = Steps(save_serving_folder(architecture, tmp_path, **changes), 1, 200)
    assert len(model.groups) == (2 if changes or architecture == "gemma2" else 1)
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
