"""The test a model passes before it serves: packed and chunked it computes what its plain forward pass computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from executor_svc.batch import NO_BLOCK, IntArray, LayerGroup
from executor_svc.kv_cache import PagedPool
from executor_svc.packed_model import PackedTraits, UnpackableError


class StepModel(Protocol):
    """Whatever runs the steps of a model."""

    mode: str
    traits: PackedTraits
    device: torch.device

    @property
    def reads_inputs(self) -> bool:
        """Whether steps can be computed from inputs on the device alone."""
        ...

    def step(
        self,
        query_lengths: IntArray,
        context_lengths: IntArray,
        block_tables: Sequence[NDArray[np.int32]],
        token_ids: torch.Tensor,
        pool: PagedPool,
        row_index: torch.Tensor,
    ) -> torch.Tensor:
        """Compute a step and return the logits of the tokens in `row_index`, `[rows, vocabulary]`.

        The arguments are those of a `StepBatch`. What is returned may be overwritten by the next step.
        """
        ...


BlockTables = NDArray[np.int32]  # [rows, blocks]

# Largest accepted distance from the plain logits, relative to their spread. In float32 packed mode is within 1e-5;
# in the half types the plain forward pass itself is as far off as this allows.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_BLOCK_SIZE = 4
# Tokens of each sequence in each step: a chunk beside a prompt, a chunk beside a decode, then decodes. The third sees
# more keys than fit into one round of a blocked attention, in chunks that begin and end anywhere.
_SCHEDULE = ((5, 4, 40), (3, 1, 70), (1, 1, 35), (1, 1, 1), (1, 1, 1), (0, 0, 1), (0, 0, 1), (0, 0, 1))
_LENGTHS = tuple(sum(counts) for counts in zip(*_SCHEDULE, strict=True))


@dataclass(frozen=True, slots=True)
class PlainLogits:
    """The test sequences and their logits by the model's own attention, without a cache."""

    token_ids: list[torch.Tensor]  # [tokens]
    logits: list[torch.Tensor]  # [tokens, vocabulary] float32


def plain_logits(model: Any, vocabulary_size: int, context_length: int) -> PlainLogits:
    """Run the test sequences, cut to `context_length`, through the model as transformers does.

    Call it before packed mode is switched on.
    """
    sequences = [
        (torch.arange(min(length, context_length), device=model.device) * 7919 + 31 * seed + 3) % vocabulary_size
        for seed, length in enumerate(_LENGTHS)
    ]
    with torch.inference_mode():
        logits = [model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float() for ids in sequences]
    for computed in logits:
        if not computed.isfinite().all():
            raise UnpackableError(f"its plain forward pass gives NaN or infinite logits in {model.dtype}")
    return PlainLogits(sequences, logits)


def check_steps(model: StepModel, plain: PlainLogits, dtype: torch.dtype) -> None:
    """Raise `UnpackableError` unless the model's steps give the plain logits."""
    geometry = model.traits.geometry(_BLOCK_SIZE)
    lengths = np.array([len(ids) for ids in plain.token_ids])
    tables = _scattered_tables(geometry.groups, lengths)
    block_count = sum(table.size for table in tables)
    pool = PagedPool(geometry, block_count, model.traits.cache_dtype, model.device)
    distances: dict[tuple[bool, bool], list[float]] = {}  # of the long sequence or not, of decoded tokens or chunks'
    computed = np.zeros(len(lengths), dtype=np.int64)
    for counts in _SCHEDULE:
        query_lengths = np.minimum(counts, lengths - computed)
        rows = np.flatnonzero(query_lengths)
        spans = [slice(computed[row], computed[row] + query_lengths[row]) for row in rows]
        token_ids = torch.cat([plain.token_ids[row][span] for row, span in zip(rows, spans, strict=True)])
        with torch.inference_mode():
            seen = [_seen_entries(*pair, computed)[rows] for pair in zip(geometry.groups, tables, strict=True)]
            all_rows = torch.arange(len(token_ids), device=model.device)
            contexts = (computed + query_lengths)[rows]
            actual = model.step(query_lengths[rows], contexts, seen, token_ids, pool, all_rows).float()
        for row, span, out in zip(rows, spans, actual.split(query_lengths[rows].tolist()), strict=True):
            kind = bool(lengths[row] == max(lengths)), len(out) == 1
            distances.setdefault(kind, []).extend(_distances(out, plain.logits[row][span]))
        computed += query_lengths
        if (computed == lengths).all():
            break
    # In the half types a mixture of experts may send a token elsewhere for a rounding error: single tokens are far
    # off in a correct model, but not most of them.
    worst = max(max(some) if dtype == torch.float32 else median(some) for some in distances.values())
    if not worst <= _TOLERANCE[dtype]:
        raise UnpackableError(
            f"the logits of its steps are {worst:.2g} away from those of its plain forward pass "
            f"(accepted in {str(dtype).removeprefix('torch.')}: {_TOLERANCE[dtype]:g})"
        )


def _scattered_tables(groups: Sequence[LayerGroup], lengths: IntArray) -> list[BlockTables]:
    """Block tables for the test sequences by layer group: every block once, none beside its neighbour."""
    widths = [-(-int(max(lengths)) // group.block_size) for group in groups]
    count = len(lengths) * sum(widths)
    ids = iter([*range(count - 1, -1, -2), *range(count - 2, -1, -2)])
    return [np.fromiter(ids, np.int32, len(lengths) * width).reshape(len(lengths), width) for width in widths]


def _seen_entries(group: LayerGroup, table: BlockTables, computed: IntArray) -> BlockTables:
    """The table as a scheduler has it, which has given back the blocks behind what is seen from now on."""
    first = group.first_seen(computed) // group.block_size
    return np.where(np.arange(table.shape[1]) < first[:, None], np.int32(NO_BLOCK), table)


def _distances(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """For each token the norm of the difference over that of the expected logits about their mean."""
    spread = expected - expected.mean(-1, keepdim=True)
    distances: list[float] = ((actual - expected).norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-6)).tolist()
    return distances
