"""`kv_fold` against its reference."""

import pytest
import torch
from cases import DEVICE, FP8, LAYOUTS, close, name_of, pool, randn

from ouro_vllm.kernels.fp8 import dequantise, quantise
from ouro_vllm.kernels.kv_fold import kv_fold, kv_fold_naive

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, FP8: 0.0, torch.float8_e4m3fnuz: 0.0}


def filled(seed: int, blocks: int, block_size: int, heads: int, head_size: int, dtype: torch.dtype, layout: str):
    """Caches whose block 0 is NaN, as freed blocks may be, and the others random."""
    caches = pool(blocks, block_size, heads, head_size, dtype, layout)
    generator = torch.Generator().manual_seed(seed)
    for cache in caches:
        cache[1:] = quantise(2 * randn(generator, blocks - 1, block_size, heads, head_size), 0.5, dtype).to(DEVICE)
    return caches


def check(sources: list[list[int]], destinations: list[int], *, blocks: int = 14, seed: int = 0, **sizes) -> None:
    """Both on equal caches; what is not a destination must stay as it is, NaN included."""
    sizes = {"block_size": 16, "heads": 2, "head_size": 64, "dtype": torch.float32, "layout": LAYOUTS[0]} | sizes
    found, wanted = (filled(seed, blocks, *sizes.values()) for _ in range(2))
    table = torch.tensor(sources, dtype=torch.int32, device=DEVICE)
    targets = torch.tensor(destinations, dtype=torch.int32, device=DEVICE)
    kv_fold(*found, table, targets, 0.5, 0.5)
    kv_fold_naive(*wanted, table, targets, 0.5, 0.5)
    for a, b in zip(found, wanted, strict=True):
        close(dequantise(a, 0.5), dequantise(b, 0.5), TOLERANCE[sizes["dtype"]])


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=name_of)
def test_types(dtype: torch.dtype, head_size: int) -> None:
    check([[1, 5, 3, 9], [2, 4, 6, 8]], [10, 12], dtype=dtype, head_size=head_size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check([[1, 5, 3]], [10], layout=layout, heads=3, block_size=32)


def test_padding_and_missing_loops() -> None:
    """-1 is no loop; a fold without destination or without sources writes nothing."""
    check([[1, -1, 3, -1], [2, 4, 6, 8], [-1, -1, -1, -1], [7, 7, 7, 7]], [10, -1, 11, 12])


def test_into_a_source() -> None:
    """The block of the last loop may take the mean of all."""
    check([[1, 2, 3, 4], [5, 6, 7, 8]], [4, 8])


def test_one_loop_is_a_copy() -> None:
    check([[3]], [9], dtype=torch.bfloat16, heads=5, head_size=16)


def test_nothing_to_fold() -> None:
    caches = filled(0, 4, 16, 2, 64, torch.float32, LAYOUTS[0])
    kv_fold(*caches, torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    for found, before in zip(caches, filled(0, 4, 16, 2, 64, torch.float32, LAYOUTS[0]), strict=True):
        close(found, before, 0.0)


def test_nan_in_a_source_shows() -> None:
    caches = filled(0, 6, 16, 2, 64, torch.float32, LAYOUTS[0])
    kv_fold(*caches, torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE), torch.tensor([5], device=DEVICE))
    assert caches[0][5].isnan().all()


def test_bad_calls() -> None:
    caches = filled(0, 4, 16, 2, 64, torch.float32, LAYOUTS[0])
    with pytest.raises(ValueError, match=r"sources must be \[F, R\]"):
        kv_fold(*caches, torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be alike"):
        kv_fold(caches[0], caches[1][:, :8], torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
