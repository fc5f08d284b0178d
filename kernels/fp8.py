"""Eight-bit floats e4m3 (OCP "fn", and AMD's "fnuz" with a bias one higher), in integer arithmetic.

Not every GPU converts them by itself (sm_80 does not), and not all that do saturate; this is the same on all, and in
the interpreter. A stored code times the cache's scale is the value, as in vLLM.
"""

import torch
import triton
import triton.language as tl

# `FP8` of the kernels: 0 is a cache of plain floats.
KINDS = {torch.float8_e4m3fn: 1, torch.float8_e4m3fnuz: 2}


def kind(dtype: torch.dtype) -> int:
    """The kernels' `FP8` for a cache of `dtype`.

    Raises:
        TypeError: a cache that is neither of plain floats nor e4m3.
    """
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return 0
    if dtype not in KINDS:
        raise TypeError(
            f"a KV cache of {dtype} is not supported. Use float32, float16, bfloat16 or float8_e4m3fn/fnuz; bytes that "
            "hold fp8 are given as `cache.view(torch.float8_e4m3fn)`."
        )
    return KINDS[dtype]


def codes(cache: torch.Tensor) -> torch.Tensor:
    """`cache` as the kernels take it: fp8 as bytes, anything else as it is."""
    return cache.view(torch.uint8) if cache.dtype in KINDS else cache


def quantise(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Reference: x of any shape as `dtype`; an e4m3 cache gets the nearest code of x / scale, saturated."""
    if dtype not in KINDS:
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def dequantise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Reference: cache entries of any shape as float32."""
    return x.float() * scale if x.dtype in KINDS else x.float()


@triton.jit
def decode(code, FP8: tl.constexpr):
    """Bytes as float16, exactly: the bits are shifted to float16's places, the biases made good by a power of two."""
    wide = code.to(tl.uint16)
    nan = (wide & 0x7F) == 0x7F if FP8 == 1 else wide == 0x80
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7) | (nan.to(tl.uint16) * 0x7E00)
    return bits.to(tl.float16, bitcast=True) * (256.0 if FP8 == 1 else 128.0)


@triton.jit
def encode(x, FP8: tl.constexpr):
    """float32 as bytes: round to nearest, ties to even, saturate; NaN stays NaN."""
    # fn: bias 7, largest 448, subnormals below 2^-6. fnuz: bias 8, largest 240, subnormals below 2^-7, no minus zero.
    LARGEST: tl.constexpr = 448.0 if FP8 == 1 else 240.0
    REBIAS: tl.constexpr = (120 if FP8 == 1 else 119) << 23
    SUBNORMAL: tl.constexpr = 0.015625 if FP8 == 1 else 0.0078125
    # Adding this leaves in the low bits of the sum how many of the smallest subnormal there are, rounded.
    ROUNDER: tl.constexpr = 16384.0 if FP8 == 1 else 8192.0
    ROUNDER_BITS: tl.constexpr = (141 if FP8 == 1 else 140) << 23
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits - REBIAS + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    subnormal = (magnitude + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    code = tl.where(magnitude < SUBNORMAL, subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    if FP8 == 1:
        code = tl.where(x != x, 0x7F, code | sign)
    else:
        code = tl.where(x != x, 0x80, tl.where(code == 0, 0, code | sign))
    return code.to(tl.uint8)
