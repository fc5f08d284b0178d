"""`kv_write` against its reference."""

import pytest
import torch
from cases import DEVICE, FP8, LAYOUTS, close, name_of, pool, randn

from ouro_vllm.kernels.fp8 import dequantise
from ouro_vllm.kernels.kv_write import kv_write, kv_write_naive

# With RoPE; without, entries are copied. fp8: rotation may round the other way before quantisation, by one code.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FP8_STEP = 0.13


def check(
    slots: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    layout: str = LAYOUTS[0],
    rope: bool = False,
) -> None:
    """Both on caches full of NaN: what is not a row's slot stays NaN. The rows are slices of a fused QKV."""
    generator = torch.Generator().manual_seed(len(slots))
    rows, kv_dtype = len(slots), kv_dtype or dtype
    fused = (2 * randn(generator, rows, heads + 2 * kv_heads, head_size)).to(dtype)
    fused[[slot < 0 for slot in slots]] = float("nan")
    angles = randn(generator, 100, head_size // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype).to(DEVICE)
    positions = torch.randint(100, (rows,), generator=generator)
    positions[torch.tensor(slots) < 0] = 10**12
    results = []
    for write in (kv_write, kv_write_naive):
        caches = pool(6, block_size, kv_heads, head_size, kv_dtype, layout)
        query, key, value = fused.clone().to(DEVICE).split([heads, kv_heads, kv_heads], dim=1)
        rotation = {"query": query, "positions": positions.to(DEVICE), "cos_sin": cos_sin} if rope else {}
        write(key, value, *caches, torch.tensor(slots, device=DEVICE), 0.5, 2.0, **rotation)
        results.append([dequantise(caches[0], 0.5), dequantise(caches[1], 2.0), query, key, value])
    tolerance = TOLERANCE[dtype] if rope else 0.0
    for part, (found, wanted) in enumerate(zip(*results, strict=True)):
        close(found, wanted, max(tolerance, FP8_STEP) if part == 0 and rope and kv_dtype != dtype else tolerance)
    written = {divmod(slot, block_size) for slot in slots if slot >= 0}
    kept = ~results[0][0].isnan().all(dim=(2, 3)).cpu()
    assert {tuple(at) for at in kept.nonzero().tolist()} == written


SLOTS = [17, 0, 95, -1, 16, 31, 32]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=name_of)
def test_types(dtype: torch.dtype, head_size: int, rope: bool) -> None:
    check(SLOTS, dtype=dtype, head_size=head_size, rope=rope)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kv_dtype", [FP8, torch.float8_e4m3fnuz], ids=name_of)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=name_of)
def test_fp8_cache(dtype: torch.dtype, kv_dtype: torch.dtype, rope: bool) -> None:
    check(SLOTS, dtype=dtype, kv_dtype=kv_dtype, rope=rope)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(SLOTS, layout=layout, rope=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (20, 10), (16, 2)])
def test_head_counts(heads: int, kv_heads: int) -> None:
    """One head, odd counts, more than one program's worth, many queries to a key."""
    check(SLOTS, heads=heads, kv_heads=kv_heads, rope=True)


def test_one_row() -> None:
    check([40], rope=True)


def test_only_padding() -> None:
    check([-1, -1, -1], rope=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, dtype=torch.int64)}, r"slots must be \[3\]"),
        ({"value": torch.zeros(3, 1, 64)}, "key and value must be"),
        ({"cos_sin": torch.zeros(9, 64)}, "RoPE needs query and positions"),
        (
            {
                "cos_sin": torch.zeros(9, 32),
                "query": torch.zeros(3, 2, 64),
                "positions": torch.zeros(3, dtype=torch.int64),
            },
            "RoPE of the whole head",
        ),
    ],
)
def test_bad_calls(change: dict, message: str) -> None:
    caches = pool(4, 16, 2, 64, torch.float32)
    given = {
        "key": torch.zeros(3, 2, 64),
        "value": torch.zeros(3, 2, 64),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slots": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        kv_write(**(given | change))
