"""The native step's functions and structures, field by field as in `model.h`."""

from __future__ import annotations

import ctypes
from functools import cache

from executor_svc.native.build import NativeUnavailableError, library_path

Pointer = ctypes.c_void_p
Integer = ctypes.c_int64

FLOAT32, BFLOAT16 = 1, 2  # bits of `paceline_types`
PHASES = (
    "embeddings",
    "norms",
    "q, k, v",
    "positions and cache",
    "attention",
    "attention's output",
    "gate and up",
    "down",
    "logits",
)
"""What a step's time is spent on, in the order of `paceline_spent_ns`."""


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class NativeLayer(ctypes.Structure):
    """One layer: weights, and its part of the pool."""

    _fields_ = [
        *_fields("norm1 norm2 after_attention after_product query_norm key_norm", Pointer),
        *_fields("qkv out router gate_ups downs qkv_bias out_bias keys values", Pointer),
        *_fields("key_stride value_stride group block_size window rotation", Integer),
        *_fields("score_cap", ctypes.c_float),
    ]


class NativeModel(ctypes.Structure):
    """A model: sizes, layers, and what follows them."""

    _fields_ = [
        *_fields("is_bf16 is_int8 layer_count hidden heads key_heads dim inner vocabulary rotated", Integer),
        *_fields("norms_heads_together experts chosen sums_to_one", Integer),
        *_fields("epsilon scaling gate_slope gate_cube logit_cap embedding_scale", ctypes.c_float),
        *_fields("layers norm output embedding", Pointer),
    ]


class NativeStep(ctypes.Structure):
    """The tokens of one step, and where its logits go."""

    _fields_ = [
        *_fields("token_count row_count sampled_count", Integer),
        *_fields("row_start context tables widths cosine sine tokens previous sampled", Pointer),
        *_fields("logits likeliest highest scratch", Pointer),
    ]


@cache
def library() -> ctypes.CDLL:
    """The library, built first where it has not been. Raises `NativeUnavailableError`."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"'{path}' cannot be loaded: {error}; remove it") from error
    signatures = {
        "paceline_types": (Integer, []),
        "paceline_pack": (None, [Integer, Pointer, Integer, Integer, Pointer]),
        "paceline_pack_int8": (None, [Integer, Integer, Pointer, Integer, Integer, Pointer]),
        "paceline_scratch_bytes": (Integer, [Pointer, Integer]),
        "paceline_team": (Pointer, [Integer]),
        "paceline_team_end": (None, [Pointer]),
        "paceline_submit": (ctypes.c_uint32, [Pointer, Pointer, Pointer]),
        "paceline_wait": (Integer, [Pointer, ctypes.c_uint32]),
        "paceline_spent_ns": (None, [Pointer, Pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
