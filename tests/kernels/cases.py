"""Random KV caches for kernel tests: every slot that nobody may read holds NaN."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ouro_vllm.kernels.fp8 import KINDS, quantise

DEVICE = os.environ["OURO_KERNELS_ON"]
FP8 = torch.float8_e4m3fn
LAYOUTS = ("heads first", "keys beside values", "slots first")


def name_of(value: object) -> str | None:
    """Short names of dtypes in test ids."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def nan(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype not in KINDS:
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    code = {torch.float8_e4m3fn: 0x7F, torch.float8_e4m3fnuz: 0x80}[dtype]
    return torch.full(shape, code, dtype=torch.uint8, device=DEVICE).view(dtype)


def pool(
    blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: torch.dtype, layout: str = LAYOUTS[0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches full of NaN, [blocks, block_size, kv_heads, head_size] views of one tensor.

    The layouts are those of vLLM 0.32 (heads first), of its older attention backends, and of its FlashAttention.
    """
    if layout == "heads first":
        whole = nan((blocks, kv_heads, block_size, 2 * head_size), dtype).transpose(1, 2)
        return whole[..., :head_size], whole[..., head_size:]
    if layout == "keys beside values":
        return nan((2, blocks, block_size, kv_heads, head_size), dtype).unbind(0)
    return nan((blocks, 2, block_size, kv_heads, head_size), dtype).unbind(1)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Fails with the elements that differ by more than tolerance x (1 + |wanted|), or are NaN in one only."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    same = ((found - wanted).abs() <= tolerance * (1 + wanted.abs())) | (found.isnan() & wanted.isnan())
    # Equal infinities differ by NaN.
    same |= found == wanted
    wrong = (~same).nonzero()
    if len(wrong):
        shown = [f"  {tuple(at.tolist())}: {found[tuple(at)]:.6g}, not {wanted[tuple(at)]:.6g}" for at in wrong[:12]]
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise AssertionError(f"{len(wrong)} of {wanted.numel()} elements differ:\n" + "\n".join(shown) + more)


@dataclass
class Rows:
    """Arguments of `plan` and of the reference, in the order of the query's rows; see `plan`."""

    request: list[int]
    own: list[int]
    position: list[int]
    window_start: list[int]
    shared: list[int]

    @property
    def columns(self) -> tuple[list[int], ...]:
        return self.request, self.own, self.position, self.window_start, self.shared


@dataclass
class Pages:
    """A cache in which only what `rows` read is written. tables: int32 [G, B, W]; unread entries name block 0."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    tables: torch.Tensor


def window_start(position: int, window: int, block_size: int) -> int:
    """Where the window of the last `window` tokens begins, rounded down to a block."""
    return max(0, position + 1 - window) // block_size * block_size


def pages(
    generator: torch.Generator,
    rows: Rows,
    groups: int,
    block_size: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    layout: str = LAYOUTS[0],
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Pages:
    read = set()
    for b, own, position, start in zip(*rows.columns[:4], strict=True):
        read |= {(rows.shared[b], b, p) for p in range(min(start, position + 1))}
        read |= {(own, b, p) for p in range(start, position + 1)}
    wanted = sorted({(group, b, p // block_size) for group, b, p in read})
    key_cache, value_cache = pool(len(wanted) + 3, block_size, kv_heads, head_size, dtype, layout)
    tables = torch.zeros(groups, len(rows.shared), 1 + max(rows.position) // block_size, dtype=torch.int32)
    ids = (1 + torch.randperm(len(wanted) + 2, generator=generator)).tolist()
    for at, block in zip(wanted, ids, strict=False):
        tables[at] = block
    places = torch.tensor(sorted(read), dtype=torch.int64).view(-1, 3)
    blocks = tables[places[:, 0], places[:, 1], places[:, 2] // block_size].long().to(DEVICE)
    offsets = (places[:, 2] % block_size).to(DEVICE)
    for cache, scale in ((key_cache, k_scale), (value_cache, v_scale)):
        entries = scale * randn(generator, len(places), kv_heads, head_size)
        cache.view(torch.uint8 if dtype in KINDS else dtype)[blocks, offsets] = (
            quantise(entries, scale, dtype).view(torch.uint8 if dtype in KINDS else dtype).to(DEVICE)
        )
    return Pages(key_cache, value_cache, tables.to(DEVICE))
