"""The bundled checkpoint, decoded through vLLM's engine on the kernels, gives the tokens of vLLM's own attention."""

import random
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICE, close, name_of, nan, randn
from conftest import running
from test_exactness import greedy, prompts
from vllm.platforms import current_platform

from ouro_vllm.kernels import backend
from ouro_vllm.kernels.kv_write import kv_write_naive
from ouro_vllm.kernels.loop_attention import loop_attention_naive

SPECULATION = {"method": "custom_class", "model": "ouro_vllm.SelfSpeculator", "num_speculative_tokens": 4}


def test_tokens_of_the_engine(heldout: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests together, one of one token, float32; the second engine has no part in the kernels.

    Self-speculation, and loops that share: the first reads a block of the mean over loops from its first token on.
    """
    asked = prompts(heldout, [37, 1], seed=random.randrange(1000))
    options = {"speculative_config": SPECULATION, "max_model_len": 128, "max_num_seqs": 2, "block_size": 32}
    options["additional_config"] = {"ouro": {"kv_sharing": "average", "kv_window": 4}}
    # Of the passes timed at the start the interpreter is to run the smallest only.
    monkeypatch.setattr("ouro_vllm.runner.MOST_TIMED", 1)
    calls = []
    real = backend.loop_attention
    monkeypatch.setattr(backend, "loop_attention", lambda *a, **k: calls.append(a) or real(*a, **k))
    with running(**options) as llm:
        found = greedy(llm, asked, tokens=3)
    assert calls
    used = len(calls)
    monkeypatch.setattr("ouro_vllm.model.own_backend", lambda *_, **__: None)
    with running(**options) as llm:
        assert greedy(llm, asked, tokens=3) == found
    assert len(calls) == used


def builder(**sizes) -> backend.LoopMetadataBuilder:
    """Without an engine. sizes: that are not the default."""
    made = object.__new__(backend.LoopMetadataBuilder)
    made.sizes = {"heads": 2, "kv_heads": 2, "head_size": 64, "dtype": torch.float32, "device": DEVICE} | sizes
    return made


def batch(lengths: list[int], new: list[int], table: torch.Tensor) -> dict:
    """What vLLM says of sequences of `lengths` tokens, the last `new` of which are computed."""
    starts = torch.tensor([0, *new]).cumsum(0).int()
    return {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(lengths),
        "seq_lens_cpu_upper_bound": torch.tensor(lengths, dtype=torch.int32),
        "num_reqs": len(lengths),
        "num_actual_tokens": sum(new),
        "max_query_len": max(new),
        "max_seq_len": max(lengths),
        "block_table_tensor": table,
        "slot_mapping": torch.zeros(sum(new), dtype=torch.int64),
    }


def test_rows_of_mixed_depth_share_tiles() -> None:
    """The builder hands on what each row reads; without it, every sequence reads its own pages, whatever its length."""
    common = batch([40, 9], [3, 1], torch.zeros(2, 3, dtype=torch.int32))
    plain = builder().build(0, backend.CommonAttentionMetadata(**common))
    assert plain.plan.rows[2].tolist() == [37, 38, 39, 8]
    assert plain.plan.launches[0].table[:, 1:3].tolist() == [[3, 0], [1, 1]]
    assert plain.tables.shape == (1, 2, 3)

    rows = {"request": [0] * 4, "own": [0, 1, 2, 2], "position": [39, 38, 37, 36], "window_start": [32, 16, 16, 16]}
    mixed = backend.LoopCommonMetadata(**common, **rows, tables=torch.zeros(4, 1, 3, dtype=torch.int32), shared=[3])
    made = builder().build(0, mixed)
    assert made.plan.launches[0].table.tolist() == [[0, 4, 0, 3]]
    assert made.tables.shape == (4, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_a_layer_with_scales(cache_dtype: str, dtype: torch.dtype) -> None:
    """As vLLM's layer calls it: a cache of its layout (fp8: bytes) full of NaN is written, then read; rows of padding.

    One sequence of two chunks, and one that is a single token.
    """
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_size, block_size = 4, 2, 64, 16
    impl = backend.LoopAttentionImpl(heads, head_size, 0.125, kv_heads, kv_cache_dtype=cache_dtype)
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    stored = current_platform.fp8_dtype() if cache_dtype != "auto" else dtype
    cache = nan((9, kv_heads, block_size, 2 * head_size), stored)
    given = cache.view(torch.uint8) if cache_dtype != "auto" else cache
    wanted = cache.clone().transpose(1, 2).split(head_size, dim=-1)
    table = torch.tensor([[7, 2, 5], [4, 0, 0]], dtype=torch.int32, device=DEVICE)
    made = builder(heads=heads, kv_heads=kv_heads, dtype=dtype)
    for lengths, new in (([21, 1], [21, 1]), ([38], [17])):
        rows = [(b, p) for b in range(len(new)) for p in range(lengths[b] - new[b], lengths[b])]
        query, key, value = (
            (2 * randn(generator, len(rows) + 1, count, head_size)).to(dtype).to(DEVICE)
            for count in (heads, kv_heads, kv_heads)
        )
        slots = [int(table[b, p // block_size]) * block_size + p % block_size for b, p in rows] + [-1]
        slots = torch.tensor(slots, device=DEVICE)
        metadata = made.build(0, backend.CommonAttentionMetadata(**batch(lengths, new, table[: len(new)])))
        out = torch.full_like(query, float("nan"))
        impl.do_kv_cache_update(layer, key, value, given, slots)
        impl.forward(layer, query, key, value, given, metadata, out)

        kv_write_naive(key, value, *wanted, slots, 0.5, 2.0)
        nought, (request, position) = [0] * len(rows), zip(*rows, strict=True)
        columns = (request, nought, position, nought, [0] * len(new))
        expected = loop_attention_naive(query[:-1], *wanted, table[None], *columns, 0.125, 0.5, 2.0)
        close(out[:-1], expected, 1e-5 if dtype == torch.float32 else 4e-2)
        assert out[-1].isnan().all()


@pytest.mark.parametrize("unsupported", [{"sliding_window": 8}, {"logits_soft_cap": 3.0}, {"alibi_slopes": [1.0]}])
def test_other_attention_is_refused(unsupported: dict) -> None:
    with pytest.raises(ValueError, match="another --attention-backend"):
        backend.LoopAttentionImpl(2, 64, 1.0, **unsupported)
