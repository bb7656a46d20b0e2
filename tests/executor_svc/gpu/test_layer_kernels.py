"""Norms, rotations and products of decoder layers as transformers computes them, rounded where it rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as rotate_in_float32
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_some
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from executor_svc.attention.layout import KeySource
from executor_svc.batch import LayerGroup
from executor_svc.gpu.inputs import StepInputs, inputs_of
from executor_svc.gpu.layer_kernels import Norm, add_rms_norm, gated_product, rms_norm, rotate_and_store
from executor_svc.layer_groups import Visibility

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# One rounding to the type or the next; Triton's interpreter cuts numbers off where it makes bfloat16 of float32.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
TYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE, dtype)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCES[actual.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def module_of(kind: type, width: int, dtype: torch.dtype, seed: int = 7) -> torch.nn.Module:
    module = kind(width, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = numbers(width, dtype=dtype, seed=seed) + (0 if kind is Gemma3RMSNorm else 1)
    return module.requires_grad_(False)


NORMS = [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_norm_is_that_of_the_models_own_code(kind, width, dtype):
    """Families differ in where they round and what their weights count from."""
    module = module_of(kind, width, dtype)
    x = numbers(5, width, dtype=dtype, spread=3.0)

    assert_equal(rms_norm(x, Norm.of(module)), module(x))


def test_a_norm_rounds_where_the_models_own_code_rounds():
    """Two roundings are not one: a norm that rounds elsewhere differs in the last bit of many numbers."""
    x = numbers(9, 256, dtype=torch.float16, spread=3.0)
    for kind in NORMS:
        module = module_of(kind, 256, torch.float16)
        expected = module(x)
        same = (rms_norm(x, Norm.of(module)) == expected).float().mean()
        other = replace(Norm.of(module), rounds_first=not Norm.of(module).rounds_first)

        assert same > 0.995
        assert (rms_norm(x, other) == expected).float().mean() < 0.9


def test_a_norm_takes_part_of_wider_rows_in_place():
    """Heads that are normed together lie in the joined projection's output beside those that are not."""
    wide = numbers(4, 200)
    before = wide.clone()
    module = module_of(Olmo2RMSNorm, 96, torch.float32)
    part = wide[:, 64:160]
    rms_norm(part, Norm.of(module), out=part)

    assert_equal(part, module(before[:, 64:160]))
    assert torch.equal(wide[:, :64], before[:, :64])
    assert torch.equal(wide[:, 160:], before[:, 160:])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_before", [False, True])
def test_the_residual_is_updated_in_place_and_its_norm_returned(dtype, has_before):
    """The next layer adds to what this one left, rounded as the model's own code rounds sums."""
    before, after = (module_of(Gemma3RMSNorm, 96, dtype, seed) for seed in (1, 2))
    x, residual = numbers(5, 96, dtype=dtype), numbers(5, 96, dtype=dtype, seed=3)
    total = residual + (before(x) if has_before else x)
    normed = add_rms_norm(x, residual, Norm.of(after), Norm.of(before) if has_before else None)

    assert_equal(residual, total)
    assert_equal(normed, after(total))


def test_what_is_normed_afterwards_only_is_added():
    """OLMo norms what a layer adds and not what it reads."""
    module = module_of(Olmo2RMSNorm, 64, torch.float32)
    x, residual = numbers(3, 64), numbers(3, 64, seed=3)
    total = residual + module(x)

    assert add_rms_norm(x, residual, None, before=Norm.of(module)) is residual
    assert_equal(residual, total)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("inner", [64, 1100])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_gated_product_is_that_of_the_models_own_code(activation, inner, dtype):
    """Large gates must neither overflow nor lose the small ones beside them."""
    gate_up = numbers(3, 2 * inner, dtype=dtype, spread=4.0)
    gate_up[0, :4] = torch.tensor([200.0, -200.0, 1e-3, 0.0])
    # torch's own gelu loses what is small and negative to rounding in float32
    gate, up = (gate_up.double() if dtype == torch.float32 else gate_up).chunk(2, dim=-1)

    assert_equal(gated_product(gate_up, activation), (ACT2FN[activation](gate) * up).to(dtype))


def test_an_activation_without_a_kernel_is_named():
    """Whoever adds a family sees what to add."""
    with pytest.raises(ValueError, match=r"'relu' has no kernel; those that have one are silu, gelu_pytorch_tanh"):
        gated_product(numbers(1, 8), "relu")


# Three rows: a prompt, a piece of one, a decoding row; then tokens of padding, and a row of it.
QUERY_LENGTHS, CONTEXT_LENGTHS = np.array([5, 3, 1]), np.array([5, 9, 12])
BLOCK_SIZE, STRIDES, UNTOUCHED = 3, (5, 4), 9.0
BLOCKS = np.array([[2, 7, -1, -1], [-1, 4, 1, -1], [-1, -1, -1, 6]], dtype=np.int32)  # -1: nothing may read it


def padded_inputs() -> StepInputs:
    groups = (LayerGroup(block_size=8), LayerGroup(block_size=BLOCK_SIZE, window=6))
    tables = (np.full((3, 2), -1, dtype=np.int32), BLOCKS)
    token_count = int(QUERY_LENGTHS.sum())
    inputs = inputs_of(QUERY_LENGTHS, CONTEXT_LENGTHS, tables, torch.zeros(token_count), torch.zeros(0), groups, DEVICE)
    return replace(
        inputs,
        positions=functional.pad(inputs.positions, (0, 3), value=10**6),
        rows=functional.pad(inputs.rows, (0, 3), value=-1),
        row_starts=functional.pad(inputs.row_starts, (0, 1), value=token_count),
        contexts=functional.pad(inputs.contexts, (0, 1)),
        table_starts=functional.pad(inputs.table_starts, (0, 1), value=10**6),
        token_ids=functional.pad(inputs.token_ids, (0, 3)),
    )


def expected_pool(per_token: torch.Tensor, stride: int, slot_count: int) -> torch.Tensor:
    """A pool in which nothing but the step's tokens has changed."""
    pool = torch.full((slot_count, *per_token.shape[1:]), UNTOUCHED, dtype=per_token.dtype, device=DEVICE)
    token = 0
    for row, (length, context) in enumerate(zip(QUERY_LENGTHS, CONTEXT_LENGTHS, strict=True)):
        for position in range(context - length, context):
            pool[BLOCKS[row, position // BLOCK_SIZE] * stride + position % BLOCK_SIZE] = per_token[token]
            token += 1
    return pool


def rotations(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(16)[:, None] / 100.0 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("heads", "dim", "rotated", "norm"),
    [
        ((4, 2), 64, 64, None),
        ((6, 2), 80, 80, None),
        ((3, 1), 96, 64, None),
        ((4, 1), 24, 12, None),
        ((4, 2), 64, 64, Qwen3RMSNorm),
        ((7, 1), 40, 40, Gemma3RMSNorm),
        ((6, 2), 256, 256, Gemma3RMSNorm),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_queries_and_keys_are_normed_and_rotated_and_the_cache_written(heads, dim, rotated, norm, dtype, table_dtype):
    """One launch does what the model's own code and the cache do, and touches nothing that padding could."""
    query_heads, key_heads = heads
    inputs = padded_inputs()
    token_count, real = inputs.token_count, int(QUERY_LENGTHS.sum())
    qkv = numbers(token_count, (query_heads + 2 * key_heads) * dim, dtype=dtype, spread=2.0)
    norms = [module_of(norm, dim, dtype, seed) for seed in (5, 6)] if norm else None
    rotation = rotations(rotated, table_dtype)
    keys, values = (
        torch.full((8 * stride, key_heads, dim), UNTOUCHED, dtype=dtype, device=DEVICE) for stride in STRIDES
    )
    query = rotate_and_store(
        qkv,
        rotation,
        (Norm.of(norms[0]), Norm.of(norms[1])) if norms else None,
        keys,
        values,
        inputs,
        KeySource(1, Visibility(window=6), key_heads, *STRIDES),
    )

    parts = qkv[:real].unflatten(1, (-1, dim)).split([query_heads, key_heads, key_heads], dim=1)
    q, k = ((norms[i](part) if norms else part).transpose(0, 1)[None] for i, part in enumerate(parts[:2]))
    cosine, sine = (table[inputs.positions[:real]][None] for table in rotation)
    q, k = (rotate_some if rotated < dim else rotate_in_float32)(q, k, cosine, sine)
    # A rotation may make something small of large numbers, whose last bits then show.
    tolerance = TOLERANCES[dtype] * float(q.abs().max())
    assert_equal(query[:real], q[0].transpose(0, 1).to(dtype), tolerance)
    assert_equal(keys, expected_pool(k[0].transpose(0, 1).to(dtype), STRIDES[0], len(keys)), tolerance)
    assert_equal(values, expected_pool(parts[2], STRIDES[1], len(values)), tolerance=0)
