"""Kernels as real models launch them, for tests that compile them without a GPU."""

from dataclasses import dataclass
from typing import Any

from executor_svc.gpu import layer_kernels


@dataclass(frozen=True)
class Variant:
    """What `triton.compiler.ASTSource` and its options need."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int


def variant(name: str, fn: Any, num_warps: int, **arguments: Any) -> Variant:
    """Arguments that are strings are types, `*bf16` say; all others are constants."""
    types = {key: value if isinstance(value, str) else "constexpr" for key, value in arguments.items()}
    assert list(types) == fn.arg_names, f"{name}: {sorted(set(types) ^ set(fn.arg_names))}"
    return Variant(
        name, fn, types, {key: value for key, value in arguments.items() if types[key] == "constexpr"}, num_warps
    )


def compile_variants() -> list[Variant]:
    return [*_norms(), *_rotations(), *_products()]


def _norms() -> list[Variant]:
    return [
        variant(
            f"norm of {block} {dtype}{' after a norm' if has_before else ''}",
            layer_kernels._add_norm_kernel,
            min(32, block // 512),
            x=f"*{dtype}",
            residual=f"*{dtype}",
            out=f"*{dtype}",
            weight_before=f"*{dtype}" if has_before else None,
            weight=f"*{dtype}",
            epsilon_before="fp32",
            epsilon="fp32",
            x_stride="i32",
            residual_stride="i32",
            out_stride="i32",
            width="i32",
            from_one=has_before,
            rounds_first=not has_before,
            block=block,
        )
        for dtype, block, has_before in (("bf16", 4096, False), ("bf16", 8192, True), ("fp32", 16384, False))
    ]


def _rotations() -> list[Variant]:
    return [
        variant(
            f"rotation of heads of {dim} {dtype}{' after norms' if has_norms else ''}",
            layer_kernels._rotate_and_store_kernel,
            4,
            **dict.fromkeys(("qkv", "query", "keys", "values", "cosine", "sine"), f"*{dtype}"),
            **dict.fromkeys(("query_weight", "key_weight"), f"*{dtype}" if has_norms else None),
            epsilon="fp32",
            positions="*i64",
            **dict.fromkeys(("rows", "row_starts", "contexts", "tables", "table_starts"), "*i32"),
            **dict.fromkeys(("row_count", "group", "block_size", "key_stride", "value_stride", "qkv_stride"), "i32"),
            query_heads=32,
            key_heads=8,
            dim=dim,
            rotated=rotated,
            from_one=False,
            rounds_first=True,
            tile=1024 // padded,
            padded_dim=padded,
        )
        for dtype, dim, rotated, padded, has_norms in (
            ("bf16", 128, 128, 128, False),
            ("bf16", 256, 256, 256, True),
            ("fp32", 96, 48, 128, True),
        )
    ]


def _products() -> list[Variant]:
    return [
        variant(
            f"gated product of {dtype}",
            layer_kernels._gated_product_kernel,
            4,
            gate_up=f"*{dtype}",
            out=f"*{dtype}",
            stride="i32",
            inner="i32",
            is_silu=is_silu,
            block=1024,
        )
        for dtype, is_silu in (("bf16", True), ("fp32", False))
    ]
