"""FP8 casts: error bounds of E4M3, exact scales, partial blocks, and rows of nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.model.quantization import (
    FP8,
    TINY,
    cast,
    dequantize_rows,
    expand_blocks,
    pad_to_blocks,
    quantize_blocks,
    quantize_groups,
    quantize_rows,
    scale_columns,
    scale_of,
)
from moe_dist.model.spec import QUANT_KINDS

FP8_KINDS = QUANT_KINDS[1:]
quick = settings(max_examples=40, deadline=None)


def wild(*shape, seed=0):
    """Values of very different size: Gaussian times 2^-12 to 2^12 along rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = ((2.0 ** torch.randint(-6, 7, (n,), generator=generator)) for n in shape[-2:])
    return torch.randn(shape, generator=generator) * rows[:, None] * columns


def assert_rounded(restored, values, scale):
    """Nearest E4M3 (3 mantissa bits): 2^-4 of the value, or half of the least subnormal 2^-9 times the scale."""
    bound = torch.maximum(values.abs() * 2**-4, scale * 2**-10)
    assert ((restored - values).abs() <= bound * (1 + 1e-5)).all()


def scale_per_element(kind, values):
    """What the kind prescribes, group by group."""
    scale = torch.empty_like(values)
    if kind == "fp8_block":
        for start in range(0, values.shape[1], 128):
            scale[:, start : start + 128] = values[:, start : start + 128].abs().amax(1, keepdim=True) / 448
    elif kind == "fp8_channel":
        scale[:] = values.abs().amax(1, keepdim=True) / 448
    else:
        scale[:] = values.abs().max() / 448
    return scale


@pytest.mark.parametrize("kind", FP8_KINDS)
@quick
@given(R=st.integers(1, 9), K=st.integers(1, 400), seed=st.integers(0, 999), bf16=st.booleans())
def test_rows_round_trip(kind, R, K, seed, bf16):
    values = wild(R, K, seed=seed)
    values = values.bfloat16() if bf16 else values
    scale = scale_per_element(kind, values.float())
    static = values.float().abs().max() / 448 if kind == "fp8_tensor_static" else None
    rows = quantize_rows(values, kind, static)
    assert rows.values_RH.dtype == FP8
    assert rows.shape == (R, K)
    restored = dequantize_rows(rows, static)
    assert restored.dtype == torch.float32
    assert_rounded(restored, values.float(), scale)
    if kind == "fp8_tensor_static":
        assert rows.scales_RS is None
        return
    assert rows.scales_RS.dtype == torch.float32
    assert rows.scales_RS.shape == (R, -(-K // 128) if kind == "fp8_block" else 1)
    assert rows.scales_RS.is_contiguous()
    spread = rows.scales_RS.repeat_interleave(128, 1)[:, :K] if kind == "fp8_block" else rows.scales_RS
    assert torch.allclose(spread.expand(R, K), scale, rtol=1e-6)


@quick
@given(N=st.integers(1, 300), K=st.integers(1, 300), lead=st.sampled_from([(), (2,), (0,), (2, 1)]))
def test_partial_blocks_are_the_padded_computation(N, K, lead):
    values = wild(*lead, N, K, seed=N)
    codes, scales = quantize_blocks(values)
    assert codes.shape == values.shape
    assert scales.shape == (*lead, -(-N // 128), -(-K // 128))
    assert (codes.dtype, scales.dtype) == (FP8, torch.float32)
    padded = torch.zeros(*lead, -(-N // 128) * 128, -(-K // 128) * 128)
    padded[..., :N, :K] = values
    padded_codes, padded_scales = quantize_blocks(padded)
    assert torch.equal(scales, padded_scales)
    assert torch.equal(codes.float(), padded_codes.float()[..., :N, :K])
    assert_rounded(codes.float() * expand_blocks(scales, N, K), values, expand_blocks(scales, N, K))


def test_block_scales_are_the_largest_of_each_block():
    values = wild(300, 200)
    scales = quantize_blocks(values)[1]
    for n in range(3):
        for k in range(2):
            block = values[n * 128 : (n + 1) * 128, k * 128 : (k + 1) * 128]
            assert float(scales[n, k]) == pytest.approx(float(block.abs().max()) / 448)


def test_group_scales_do_not_look_over_the_edge():
    values = torch.ones(1, 200)
    values[0, 127], values[0, 128] = 448, 896
    assert quantize_groups(values).scales_RS.tolist() == [[1, 2]]


def test_expand_blocks_places_every_scale():
    expanded = expand_blocks(torch.arange(6.0).view(2, 3), 130, 300)
    assert expanded.shape == (130, 300)
    for n, k in [(0, 0), (127, 127), (128, 127), (127, 128), (129, 299)]:
        assert expanded[n, k] == 3 * (n // 128) + k // 128


@pytest.mark.parametrize(("dims", "shape"), [((-1,), (2, 130, 256)), ((-2,), (2, 256, 200)), ((-1, -2), (2, 256, 256))])
def test_pad_to_blocks(dims, shape):
    values = torch.ones(2, 130, 200)
    padded = pad_to_blocks(values, dims)
    assert padded.shape == shape
    assert torch.equal(padded[:, :130, :200], values)
    assert padded.sum() == values.sum()
    assert pad_to_blocks(padded, dims) is padded


def test_cast_rounds_to_nearest_even_and_saturates():
    values = torch.tensor([17.0, 19.0, 1.0625, 448.0, 465.0, 1e30, -1e30, 2**-10, 1.1 * 2**-10, float("inf")])
    expected = [16.0, 20.0, 1.0, 448.0, 448.0, 448.0, -448.0, 0.0, 2**-9, 448.0]
    assert cast(values, torch.tensor(1.0)).float().tolist() == expected
    assert cast(values[:2], torch.tensor(0.5)).float().tolist() == [34 - 2, 38 + 2]


def test_what_fp8_can_hold_survives_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[~codes.isnan()]
    assert len(codes) == 254
    values = (codes * 0.5)[None]
    assert torch.equal(dequantize_rows(quantize_rows(values, "fp8_channel")), values)


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_zero_rows_stay_zero_and_alone(kind):
    values = wild(4, 200)
    values[1] = 0
    static = torch.tensor(0.5) if kind == "fp8_tensor_static" else None
    restored = dequantize_rows(quantize_rows(values, kind, static), static)
    assert (restored[1] == 0).all()
    assert restored[[0, 2, 3]].abs().amin(0).max() > 0
    zeros = quantize_rows(torch.zeros(3, 200), kind, static)
    assert (dequantize_rows(zeros, static) == 0).all()
    if zeros.scales_RS is not None:
        assert torch.allclose(zeros.scales_RS, torch.tensor(TINY))


def test_scale_of_has_a_floor():
    assert scale_of(torch.tensor([896.0, 0.0, 1e-30])).tolist() == pytest.approx([2.0, TINY, TINY])


@pytest.mark.parametrize("kind", FP8_KINDS)
@pytest.mark.parametrize("K", [128, 200])
def test_no_rows(kind, K):
    static = torch.tensor(0.5) if kind == "fp8_tensor_static" else None
    rows = quantize_rows(torch.zeros(0, K, dtype=torch.bfloat16), kind, static)
    assert rows.shape == (0, K)
    assert rows.values_RH.dtype == FP8
    assert dequantize_rows(rows, static).shape == (0, K)
    if static is None:
        assert rows.scales_RS.shape == (0, scale_columns(kind, K))
        assert rows.scales_RS.dtype == torch.float32


@pytest.mark.parametrize("kind", QUANT_KINDS)
@pytest.mark.parametrize(("hidden", "groups"), [(1, 1), (128, 1), (129, 2), (4096, 32)])
def test_scale_columns(kind, hidden, groups):
    expected = {"fp8_block": groups, "fp8_channel": 1, "fp8_tensor_dynamic": 1}.get(kind, 0)
    assert scale_columns(kind, hidden) == expected
    if expected:
        assert quantize_rows(torch.ones(2, hidden), kind).scales_RS.shape[1] == expected


def test_static_scales_are_needed_and_may_differ_by_row():
    values = torch.tensor([[448.0, 7.0], [448.0, 7.0]])
    scales = torch.tensor([[1.0], [0.5]])
    rows = quantize_rows(values, "fp8_tensor_static", scales)
    assert dequantize_rows(rows, scales).tolist() == [[448, 7], [224, 7]]  # 448 saturates at 224
    with pytest.raises(ValueError, match="static scale"):
        quantize_rows(values, "fp8_tensor_static")
    with pytest.raises(ValueError, match="static scale"):
        dequantize_rows(rows)
    with pytest.raises(ValueError, match="none is no FP8 kind"):
        quantize_rows(values, "none")


def test_a_dynamic_tensor_scale_is_that_of_the_rows_given():
    values = torch.tensor([[1.0, 2.0], [3.0, -896.0], [0.5, 448.0]])
    assert quantize_rows(values, "fp8_tensor_dynamic").scales_RS.tolist() == [[2], [2], [2]]
    assert quantize_rows(values[2:], "fp8_tensor_dynamic").scales_RS.tolist() == [[1]]
