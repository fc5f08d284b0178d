"""Our e4m3 arithmetic against PyTorch's: all codes, and floats around every rounding boundary."""

import pytest
import torch
import triton
import triton.language as tl
from cases import DEVICE, name_of

from ouro_vllm.kernels import fp8

KINDS = list(fp8.KINDS)


@triton.jit
def _decode(codes, out, FP8: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, fp8.decode(tl.load(codes + n), FP8).to(tl.float32))


@triton.jit
def _encode(x, out, FP8: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, fp8.encode(tl.load(x + n), FP8))


@pytest.mark.parametrize("dtype", KINDS, ids=name_of)
def test_decode(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    found = torch.empty(256, device=DEVICE)
    _decode[(1,)](codes, found, fp8.kind(dtype), 256)
    torch.testing.assert_close(found, codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", KINDS, ids=name_of)
def test_encode(dtype: torch.dtype) -> None:
    """Every value, every midpoint between two, a bit beside both; zeros, huge, infinite, NaN and random ones."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    edges = torch.cat([values, (values[1:] + values[:-1]) / 2])
    beside = [edges.nextafter(torch.tensor(float(side))) for side in ("-inf", "inf")]
    special = torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan"), 1e-30])
    x = torch.cat([edges, *beside, special, 100 * torch.randn(500)])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x))).to(DEVICE)
    found = torch.empty(2048, dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](x, found, fp8.kind(dtype), 2048)
    wanted = fp8.quantise(x, 1.0, dtype)
    nan = wanted.float().isnan()
    assert found.view(dtype).float().isnan().equal(nan)
    wrong = (found != wanted.view(torch.uint8)) & ~nan
    assert not wrong.any(), [
        (x[i].item(), found[i].item(), wanted.view(torch.uint8)[i].item()) for i in wrong.nonzero()
    ]


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="float8_e5m2 is not supported"):
        fp8.kind(torch.float8_e5m2)
