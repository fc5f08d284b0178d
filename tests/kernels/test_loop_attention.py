"""`loop_attention` against its reference: what rows read, in whatever tile, split, layout and type."""

import importlib.util
import os
import random

import pytest
import torch
from cases import DEVICE, FP8, LAYOUTS, Rows, close, name_of, pages, randn, window_start
from triton.backends.compiler import GPUTarget

from ouro_vllm.kernels.loop_attention import loop_attention, loop_attention_naive, plan, prepare

# Of outputs of about 1: what rounding of weights and output to the type leaves (the interpreter cuts bfloat16 off).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHARED = 3


def check(
    rows: Rows,
    *,
    seed: int = 0,
    heads: int = 2,
    kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    layout: str = LAYOUTS[0],
    splits: int | None = None,
    target: GPUTarget | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    groups: int = SHARED + 1,
) -> torch.Tensor:
    """Kernel and reference on fresh random pages; the query's rows lie apart in memory, as slices of a fused QKV do."""
    generator = torch.Generator().manual_seed(seed)
    kv_dtype = kv_dtype or dtype
    case = pages(generator, rows, groups, block_size, kv_heads, head_size, kv_dtype, layout, k_scale, v_scale)
    count = len(rows.request)
    query = randn(generator, count, heads + 1, head_size).to(dtype).to(DEVICE)[:, :heads]
    out = torch.full((count, heads, head_size), float("nan"), dtype=dtype, device=DEVICE)
    scale = head_size**-0.5
    made = plan(
        *rows.columns,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
        device=DEVICE,
        splits=splits,
        target=target,
    )
    cache = (case.key_cache, case.value_cache, case.tables)
    for launch in prepare(query, *cache, made, scale, k_scale, v_scale, out, target=target):
        launch.run()
    close(out, loop_attention_naive(query, *cache, *rows.columns, scale, k_scale, v_scale), TOLERANCE[dtype])
    return out


def wavefront(contexts: list[int], window: int | None, block_size: int = 16, depths: int = 4) -> Rows:
    """Each request's newest position at depth 1, the one before at depth 2, ...; window None: everything own loop."""
    table = []
    for b, context in enumerate(contexts):
        for depth in range(min(depths, context)):
            position = context - 1 - depth
            start = 0 if window is None else window_start(position, window, block_size)
            table.append((b, depth, position, start))
    random.Random(len(table)).shuffle(table)
    return Rows(*map(list, zip(*table, strict=True)), [SHARED] * len(contexts))


def chunk(start: int, tokens: int, window: int | None, own: int = 1, block_size: int = 16) -> Rows:
    """One request, `tokens` positions at one depth: prefill, or verification of drafts."""
    positions = list(range(start, start + tokens))
    starts = [0 if window is None else window_start(p, window, block_size) for p in positions]
    return Rows([0] * tokens, [own] * tokens, positions, starts, [SHARED])


@pytest.mark.parametrize(("window", "splits"), [(None, 1), (0, 4), (3, 1), (32, 1), (32, 4), (1000, 4)])
def test_wavefront(window: int | None, splits: int) -> None:
    """Rows of all depths of two requests: no window, an empty one, less than a block, some blocks, all."""
    check(wavefront([67, 5], window), splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("start", "tokens", "window"), [(0, 31, None), (37, 19, 32), (16, 17, 0), (0, 49, 16)])
def test_chunks(start: int, tokens: int, window: int | None, splits: int) -> None:
    """Prompts, verification, recomputation in sub-chunks: many rows at one depth, several tiles of one request."""
    check(chunk(start, tokens, window), splits=splits)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 64, 129])
def test_lengths(length: int) -> None:
    """One token, and both sides of every boundary of a page and of a step."""
    check(wavefront([length], 16), seed=length)


@pytest.mark.parametrize(("head_size", "block_size"), [(16, 16), (64, 32), (80, 16), (128, 32), (256, 16)])
def test_head_sizes(head_size: int, block_size: int) -> None:
    check(wavefront([70, 33], 32, block_size), head_size=head_size, block_size=block_size)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (6, 2), (20, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    """Ratios of 4, 3 and 20: tiles of several rows, with an unused remainder, with one row of over 16 heads."""
    check(wavefront([37, 5], 16), heads=heads, kv_heads=kv_heads, splits=2)
    check(chunk(20, 9, 16), heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_types(dtype: torch.dtype, head_size: int) -> None:
    check(wavefront([51, 9], 32), dtype=dtype, head_size=head_size, splits=2)


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_fp8_cache(dtype: torch.dtype, arch: int | str) -> None:
    """Bytes decoded by ourselves (sm_80) and by Triton (sm_90, gfx942, whose codes differ), with scales."""
    if DEVICE != "cpu" and arch != 80:
        pytest.skip("this device converts its own kind only; test_fp8.py has the codes")
    target = GPUTarget("hip", arch, 64) if arch == "gfx942" else GPUTarget("cuda", arch, 32)
    kv_dtype = torch.float8_e4m3fnuz if arch == "gfx942" else FP8
    check(wavefront([37, 9], 16), dtype=dtype, kv_dtype=kv_dtype, target=target, k_scale=0.7, v_scale=3.5, splits=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(wavefront([40, 17], 16), layout=layout)


def test_mixed() -> None:
    """Decoding rows beside chunks of two depths of another request; shared pages of different groups."""
    rows = wavefront([45, 1, 33, 80], 16)
    rows.shared[2] = 2
    for own, start, tokens in ((0, 30, 15), (2, 20, 9)):
        more = chunk(start, tokens, 16, own)
        rows.request += [1] * tokens
        rows.own += more.own
        rows.position += more.position
        rows.window_start += more.window_start
    check(rows)
    check(rows, splits=2, dtype=torch.bfloat16)


def test_window_off_block_boundary() -> None:
    """The kernel itself is exact to the token: the rule that rounds is the caller's."""
    rows = wavefront([50], 16)
    rows.window_start = [start + 5 for start in rows.window_start]
    check(rows)


def test_rows_far_apart() -> None:
    """One group's rows may leave a gap that nobody reads, and that holds NaN."""
    check(Rows([0, 0], [1, 1], [3, 90], [0, 80], [SHARED]))
    check(Rows([0, 0], [1, 1], [3, 90], [0, 80], [SHARED]), splits=4)


def test_padding_rows_are_zero() -> None:
    rows = wavefront([20], 16)
    for column, value in zip((rows.request, rows.own, rows.position, rows.window_start), (0, 0, -1, 0), strict=True):
        column.append(value)
    for splits in (1, 2):
        assert not check(rows, splits=splits)[-1].any()


def test_nan_that_is_read_shows() -> None:
    """NaN a row does read reaches that row, and the other request's rows do not change."""
    rows = wavefront([50, 50], 16)
    case = pages(torch.Generator().manual_seed(0), rows, 4, 16, 2, 64, torch.float32)
    query = torch.ones(len(rows.request), 2, 64, device=DEVICE)
    made = plan(*rows.columns, heads=2, kv_heads=2, head_size=64, dtype=torch.float32, device=DEVICE)
    before = loop_attention(query, case.key_cache, case.value_cache, case.tables, made, 0.125)
    case.value_cache[case.tables[SHARED, 0, 0].item(), 3] = float("nan")
    after = loop_attention(query, case.key_cache, case.value_cache, case.tables, made, 0.125)
    hit = torch.tensor(rows.request, device=DEVICE) == 0
    hit &= torch.tensor(rows.window_start, device=DEVICE) > 3
    assert hit.any() and after[hit].isnan().all()
    close(
        after[torch.tensor(rows.request, device=DEVICE) == 1], before[torch.tensor(rows.request, device=DEVICE) == 1], 0
    )


def test_random_cases() -> None:
    """Requests, depths, windows, lengths, head counts, types and splits as they come; the seed is in the failure."""
    for seed in random.SystemRandom().sample(range(10**6), 4):
        draw = random.Random(seed)
        block_size, window = draw.choice([16, 32]), draw.choice([None, 0, 5, 16, 48])
        rows = Rows([], [], [], [], [])
        for b in range(draw.randint(1, 2)):
            rows.shared.append(draw.randrange(4))
            for position in draw.sample(range(90), draw.choice([1, 4, 9, 20])):
                rows.request.append(b)
                rows.own.append(draw.randrange(4))
                rows.position.append(position)
                rows.window_start.append(0 if window is None else window_start(position, window, block_size))
        kv_heads, dtype = draw.choice([1, 2]), draw.choice(list(TOLERANCE))
        try:
            check(
                rows,
                seed=seed,
                heads=kv_heads * draw.choice([1, 2, 5]),
                kv_heads=kv_heads,
                head_size=draw.choice([32, 48, 64]),
                block_size=block_size,
                dtype=dtype,
                splits=draw.choice([None, 1, 2, 8]),
                layout=draw.choice(LAYOUTS),
            )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_rows_of_a_request_share_a_tile() -> None:
    """A wavefront's rows are one tile per request, so that shared pages are read once for all of them."""
    rows = wavefront([100, 60, 3], 32)
    made = plan(*rows.columns, heads=16, kv_heads=16, head_size=128, dtype=torch.bfloat16, device="cpu")
    (tiles,) = made.launches
    assert tiles.table[:, 1].tolist() == [4, 4, 3]
    assert tiles.table[:, 2].tolist() == [0, 1, 2]


def test_splits_grow_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and a long context fill the device; short contexts and many requests are not split."""
    import ouro_vllm.kernels.loop_attention.tiling as module

    monkeypatch.setattr(module, "processors", lambda device: 132)
    sizes = {"heads": 16, "kv_heads": 16, "head_size": 128, "dtype": torch.bfloat16, "device": "cpu"}

    def splits(contexts: list[int]) -> int:
        return plan(*wavefront(contexts, 256).columns, **sizes).launches[0].splits

    assert splits([8192]) == 16
    assert splits([100]) == 1
    assert splits([8192] * 20) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": [3]}, "one entry in each"),
        ({"own": [0, -1]}, "own has -1"),
        ({"request": [0, 1]}, "request 1, but shared groups of 1"),
        ({"heads": 3}, "heads (3) must be a multiple"),
        ({"head_size": 72}, "head_size (72)"),
        ({"splits": 3}, "power of two"),
    ],
)
def test_bad_plans(change: dict, message: str) -> None:
    given = {"request": [0, 0], "own": [0, 1], "position": [3, 4], "window_start": [0, 0], "shared": [0]}
    sizes = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError) as caught:
        plan(**(given | sizes | change))
    assert message in str(caught.value)


@pytest.mark.parametrize("wrong", ["query", "cache", "tables", "type"])
def test_bad_calls(wrong: str) -> None:
    rows = wavefront([40], 16)
    case = pages(torch.Generator().manual_seed(0), rows, 4, 16, 2, 64, torch.float32)
    made = plan(*rows.columns, heads=2, kv_heads=2, head_size=64, dtype=torch.float32, device=DEVICE)
    query = torch.zeros(4, 2, 64, dtype=torch.float16 if wrong == "query" else torch.float32, device=DEVICE)
    key_cache, value_cache, tables = case.key_cache, case.value_cache, case.tables
    if wrong == "cache":
        value_cache = value_cache[..., :32]
    if wrong == "tables":
        tables = tables[..., :2]
    if wrong == "type":
        key_cache = value_cache = torch.zeros(4, 16, 2, 64, dtype=torch.uint8, device=DEVICE)
    expected = {
        "query": (ValueError, "the plan is for"),
        "cache": (ValueError, "the caches must be"),
        "tables": (ValueError, "at least (4, 1, 3)"),
        "type": (TypeError, "torch.uint8 is not supported"),
    }[wrong]
    with pytest.raises(expected[0]) as caught:
        loop_attention(query, key_cache, value_cache, tables, made, 1.0)
    assert expected[1] in str(caught.value)


@pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="xformers' paged attention has GPU operators only, and no GPU is at hand",
)
@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_against_xformers() -> None:
    """Own-loop pages only, four chunks of different lengths: xformers' paged causal attention reads the same."""
    from xformers.ops.fmha import memory_efficient_attention_forward
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

    page, kv_heads, head_size, tokens, contexts = 256, 8, 128, [1, 4, 17, 100], [300, 4, 513, 1000]
    generator = torch.Generator().manual_seed(0)
    rows = Rows([], [], [], [], [0] * len(tokens))
    for b, (count, context) in enumerate(zip(tokens, contexts, strict=True)):
        rows.request += [b] * count
        rows.position += range(context - count, context)
    rows.own, rows.window_start = [0] * len(rows.request), [0] * len(rows.request)
    case = pages(generator, rows, 1, page, kv_heads, head_size, torch.float16, "keys beside values")
    query = randn(generator, len(rows.request), kv_heads, head_size).half().to(DEVICE)
    made = plan(
        *rows.columns, heads=kv_heads, kv_heads=kv_heads, head_size=head_size, dtype=torch.float16, device=DEVICE
    )
    scale = head_size**-0.5
    found = loop_attention(query, case.key_cache, case.value_cache, case.tables, made, scale)
    bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        tokens, contexts, case.tables[0].contiguous(), page, device=torch.device(DEVICE)
    )
    # xformers multiplies what it masks: nothing may be NaN for it.
    caches = [cache.nan_to_num(0).reshape(1, -1, kv_heads, head_size) for cache in (case.key_cache, case.value_cache)]
    wanted = memory_efficient_attention_forward(query[None], *caches, attn_bias=bias, scale=scale)[0]
    close(found, wanted, TOLERANCE[torch.float16])
