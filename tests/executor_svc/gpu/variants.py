"""Kernels as real models launch them, for tests that compile them without a GPU."""

from dataclasses import dataclass
from typing import Any

from executor_svc.gpu import layer_kernels, sampling


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
    return [*_norms(), *_rotations(), *_products(), *_samplings()]


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
            **dict.fromkeys(("rows", "tables", "table_starts"), "*i32"),
            **dict.fromkeys(("table_offset", "block_size", "key_stride", "value_stride", "qkv_stride"), "i32"),
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


def _samplings() -> list[Variant]:
    shape = {"stride": "i32", "vocabulary_size": 128_256, "part_count": 32}
    parts = {"part_highest": "*fp32", "part_tokens": "*i32"}
    rows = {"highest": "*fp32", "bounds": "*i32"}
    variants = []
    for dtype in ("bf16", "fp32"):
        logits = {"logits": f"*{dtype}"}
        variants += [
            variant(f"likeliest of {dtype}", sampling._find_likeliest, 8, **logits, **parts, **shape, tile=4096),
            variant(
                f"bounds of {dtype}",
                sampling._bound_draws,
                16,
                **logits,
                **parts,
                **rows,
                chosen="*i64",
                finite="*i32",
                temperatures="*fp32",
                top_ks="*i32",
                top_ps="*fp32",
                weight_unit=2.0**45,
                **shape,
                tile=4096,
                padded_count=32,
            ),
            variant(
                f"race of {dtype}",
                sampling._race,
                8,
                **logits,
                part_highest="*fp32",
                part_speeds="*fp32",
                part_tokens="*i32",
                **rows,
                temperatures="*fp32",
                min_ps="*fp32",
                keys="*i64",
                **shape,
                tile=4096,
            ),
        ]
    winner = {"part_speeds": "*fp32", "part_tokens": "*i32", "bounds": "*i32", "chosen": "*i64"}
    counts = {"vocabulary_size": 128_256, "part_count": 32}
    return [*variants, variant("winner", sampling._take_winner, 1, **winner, **counts, padded_count=32)]
