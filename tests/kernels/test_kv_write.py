"""`kv_write` against its reference: entries are copied, or quantised, to the bit."""

import pytest
import torch
from cases import DEVICE, FP8, LAYOUTS, close, name_of, pool, randn

from ouro_vllm.kernels.fp8 import dequantise
from ouro_vllm.kernels.kv_write import kv_write, kv_write_naive

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLOTS = [17, 0, 95, -1, 16, 31, 32]


def check(
    slots: list[int],
    *,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    layout: str = LAYOUTS[0],
) -> None:
    """Both on caches full of NaN: what is not a row's slot stays NaN. The rows are slices of a fused QKV."""
    generator = torch.Generator().manual_seed(len(slots))
    fused = (2 * randn(generator, len(slots), 3 * kv_heads, head_size)).to(dtype)
    fused[[slot < 0 for slot in slots]] = float("nan")
    _, key, value = fused.to(DEVICE).chunk(3, dim=1)
    results = []
    for write in (kv_write, kv_write_naive):
        caches = pool(6, block_size, kv_heads, head_size, kv_dtype or dtype, layout)
        write(key, value, *caches, torch.tensor(slots, device=DEVICE), 0.5, 2.0)
        results.append([dequantise(caches[0], 0.5), dequantise(caches[1], 2.0)])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 0.0)
        kept = ~found.isnan().all(dim=(2, 3)).cpu()
        written = {divmod(slot, block_size) for slot in slots if slot >= 0}
        assert {tuple(at) for at in kept.nonzero().tolist()} == written


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_types(dtype: torch.dtype, head_size: int) -> None:
    check(SLOTS, dtype=dtype, head_size=head_size)


@pytest.mark.parametrize("kv_dtype", [FP8, torch.float8_e4m3fnuz], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_fp8_cache(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    check(SLOTS, dtype=dtype, kv_dtype=kv_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(SLOTS, layout=layout)


@pytest.mark.parametrize("kv_heads", [1, 3, 10])
def test_head_counts(kv_heads: int) -> None:
    """One head, an odd count, more than one program's worth."""
    check(SLOTS, kv_heads=kv_heads)


def test_one_row() -> None:
    check([40])


def test_only_padding() -> None:
    check([-1, -1, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(2, dtype=torch.int64)}, r"slots \[N\]; they are .* and \(2,\)"),
        ({"value": torch.zeros(3, 1, 64)}, "key and value must be"),
        ({"key_cache": torch.zeros(4, 16, 1, 64)}, "caches must be alike"),
        ({"value_cache": torch.zeros(4, 16, 2, 64, dtype=torch.float16)}, "caches must be alike"),
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
