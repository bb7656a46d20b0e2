"""Stands in for the library FlashInfer where there is none: as strict as its releases 0.6.4 to 0.7.2, in plain torch.

What a wrapper computes it computes from what was planned, and from nothing else. Sizes of workspaces are those of the
library's `PrefillPlan`, on a device with one multiprocessor.
"""

import math

import torch

__version__ = "0.6.4"

PLAN_WORKSPACE = 8 << 20
CORES = 1
head_dims = {64, 128, 256}
types = {torch.float16, torch.bfloat16}


def tile_of(packed_length: int, head_dim: int) -> int:
    """`FA2DetermineCtaTileQ`."""
    if packed_length > 64 and head_dim < 256:
        return 128
    return 64 if packed_length > 16 else 16


def scratch_bytes(heads: int, tile: int, parts: int, head_dim: int) -> int:
    """What `PrefillPlan` takes of the float workspace where rows are split."""
    return -(-heads * parts * tile * head_dim * 4 // 16) * 16 + heads * parts * tile * 4


class _Wrapper:
    def __init__(self, float_workspace_buffer, kv_layout, backend):
        assert kv_layout == "NHD"
        assert backend == "fa2", "other kernels have other limits"
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self.plan_count = self.run_count = 0
        self._planned = None
        self._row_count = 0  # fixed; 0: any
        self.reset_workspace_buffer(float_workspace_buffer, torch.zeros(PLAN_WORKSPACE, dtype=torch.uint8))

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer):
        assert int_workspace_buffer.dtype == torch.uint8
        self._scratch, self._plan_size = len(float_workspace_buffer), len(int_workspace_buffer)

    def _check_plan(self, query_starts, starts, ids, last_counts, heads, page_size, options):
        query_heads, key_heads, head_dim = heads
        for name, array in (("query_starts", query_starts), ("starts", starts), ("last_counts", last_counts)):
            assert array.dtype == torch.int32, name
            assert array.device.type == "cpu", f"{name} would be waited for"
            assert array.dim() == 1, name
        assert ids.dtype == torch.int32
        assert ids.device == self.device, "the copy of the ids would be waited for"
        assert len(query_starts) == len(starts) == len(last_counts) + 1 > 1
        assert len(ids) == starts[-1]
        for array in (query_starts, starts):
            assert array[0] == 0
            assert (array.diff() >= 0).all()
        counts = starts.diff()
        assert (counts > 0).all(), "a row without a block has no length"
        assert ((last_counts > 0) & (last_counts <= page_size)).all()
        assert ((counts - 1) * page_size + last_counts >= query_starts.diff()).all(), "queries without keys"
        assert query_heads % key_heads == 0
        assert head_dim in head_dims, f"no kernel compiles for heads of {head_dim}"
        assert {options["q_data_type"], options["kv_data_type"]} <= types
        assert options["window_left"] >= -1
        assert options["logits_soft_cap"] >= 0
        if self._row_count:
            assert len(last_counts) == self._row_count, "the batch size is fixed"

    def _check_sizes(self, query_starts, heads):
        query_heads, key_heads, head_dim = heads
        group_size, rows, queries = query_heads // key_heads, len(query_starts) - 1, int(query_starts[-1])
        parts = 2 * CORES // key_heads
        tile = tile_of(queries * group_size // rows, head_dim)
        if self._row_count:
            parts = max(parts, -(-queries * group_size // tile) + rows - 1)
        assert scratch_bytes(query_heads, tile, parts, head_dim) <= self._scratch, "batch_prefill_tmp_v"
        assert 13 * parts + 4 * (rows + 1) + 4 * (queries + 1) + 128 <= self._plan_size, "batch_prefill_merge_indptr"

    def run(self, q, paged_kv_cache, *, out):
        self.run_count += 1
        (query_starts, starts, ids, last_counts), (heads, page_size, causal, options) = self._buffers(), self._planned
        keys, values = paged_kv_cache
        assert keys.shape == values.shape
        assert keys.stride() == values.stride(), "k/v strides differs"
        assert keys.shape[1:] == (page_size, *heads[1:])
        assert q.shape == (query_starts[-1], heads[0], heads[2])
        assert q.stride(2) == keys.stride(3) == 1
        assert q.dtype == options["q_data_type"]
        assert keys.dtype == values.dtype == options["kv_data_type"]
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        assert ids.min() >= 0
        assert ids.max() < len(keys)
        for row, last_count in enumerate(last_counts.tolist()):
            blocks = ids[starts[row] : starts[row + 1]].long()
            count = (len(blocks) - 1) * page_size + last_count
            row_keys, row_values = (tensor[blocks].flatten(0, 1)[:count] for tensor in paged_kv_cache)
            span = slice(query_starts[row], query_starts[row + 1])
            out[span] = attended(q[span], row_keys, row_values, causal=causal, **options)
        return out


def attended(q, keys, values, *, causal, window_left, logits_soft_cap, sm_scale, **types):
    """Of one row; masked values are multiplied with 0, as the kernels do, and must not be NaN."""
    group_size = q.shape[1] // keys.shape[1]
    keys, values = (tensor.float().repeat_interleave(group_size, dim=1) for tensor in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * sm_scale
    if logits_soft_cap > 0:
        scores = torch.tanh(scores / logits_soft_cap) * logits_soft_cap
    position = torch.arange(len(keys) - len(q), len(keys))[:, None]
    key = torch.arange(len(keys))
    is_hidden = (key > position) & causal
    if window_left >= 0:
        is_hidden |= key < position - window_left
    weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        super().__init__(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        self.plan_count += 1
        heads, arrays = (num_qo_heads, num_kv_heads, head_dim_qk), (qo_indptr, paged_kv_indptr, paged_kv_indices)
        options = {
            "sm_scale": sm_scale,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }
        assert causal
        self._check_plan(*arrays, paged_kv_last_page_len, heads, page_size, options)
        self._check_sizes(qo_indptr, heads)
        self._arrays = tuple(array.clone() for array in (*arrays, paged_kv_last_page_len))
        self._planned = heads, page_size, causal, options

    def _buffers(self):
        return self._arrays


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
    ):
        super().__init__(float_workspace_buffer, kv_layout, backend)
        assert use_tensor_cores, "other kernels are slow where query heads share keys"
        self._fixed = None
        if use_cuda_graph:
            self._fixed = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            for buffer in self._fixed:
                assert buffer.dtype == torch.int32
                assert buffer.device == self.device
            self._row_count = len(paged_kv_last_page_len_buffer)
            assert len(paged_kv_indptr_buffer) == self._row_count + 1

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
    ):
        self.plan_count += 1
        heads, query_starts = (num_qo_heads, num_kv_heads, head_dim), torch.arange(len(indptr), dtype=torch.int32)
        options = {
            "sm_scale": sm_scale,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
        }
        self._check_plan(query_starts, indptr, indices, last_page_len, heads, page_size, options)
        self._check_sizes(query_starts, heads)
        if self._fixed is None:
            self._arrays = tuple(array.clone() for array in (indptr, indices, last_page_len))
        else:
            starts, ids, last_counts = self._fixed
            starts.copy_(indptr)
            last_counts.copy_(last_page_len)
            assert len(indices) <= len(ids), "the size of indices should be at most that of the buffer"
            ids[: len(indices)].copy_(indices)
        self._planned = heads, page_size, False, options

    def _buffers(self):
        starts, ids, last_counts = self._arrays if self._fixed is None else self._fixed
        return torch.arange(len(starts), dtype=torch.int32), starts, ids[: starts[-1]], last_counts
