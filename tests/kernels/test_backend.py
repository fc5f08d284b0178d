"""The bundled checkpoint, decoded through vLLM's engine on the kernels, gives the tokens of vLLM's own attention."""

import random

import pytest
import torch
from conftest import running
from test_exactness import greedy, prompts

from ouro_vllm.kernels import backend

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


def test_rows_of_mixed_depth_share_tiles() -> None:
    """The builder hands on what each row reads; without it, every sequence reads its own pages, whatever its length."""
    builder = object.__new__(backend.LoopMetadataBuilder)
    builder.sizes = {"heads": 2, "kv_heads": 2, "head_size": 64, "dtype": torch.float32, "device": "cpu"}
    table = torch.zeros(2, 3, dtype=torch.int32)
    common = {
        "query_start_loc": torch.tensor([0, 3, 4]),
        "query_start_loc_cpu": torch.tensor([0, 3, 4], dtype=torch.int32),
        "seq_lens": torch.tensor([40, 9]),
        "seq_lens_cpu_upper_bound": torch.tensor([40, 9], dtype=torch.int32),
        "num_reqs": 2,
        "num_actual_tokens": 4,
        "max_query_len": 3,
        "max_seq_len": 40,
        "block_table_tensor": table,
        "slot_mapping": torch.zeros(4, dtype=torch.int64),
    }
    plain = builder.build(0, backend.CommonAttentionMetadata(**common))
    assert plain.plan.rows[2].tolist() == [37, 38, 39, 8]
    assert plain.plan.launches[0].table[:, 1:3].tolist() == [[3, 0], [1, 1]]
    assert plain.tables.shape == (1, 2, 3)

    rows = {"request": [0] * 4, "own": [0, 1, 2, 2], "position": [39, 38, 37, 36], "window_start": [32, 16, 16, 16]}
    mixed = backend.LoopCommonMetadata(**common, **rows, tables=torch.zeros(4, 1, 3, dtype=torch.int32), shared=[3])
    made = builder.build(0, mixed)
    assert made.plan.launches[0].table.tolist() == [[0, 4, 0, 3]]
    assert made.tables.shape == (4, 1, 3)


@pytest.mark.parametrize("unsupported", [{"sliding_window": 8}, {"logits_soft_cap": 3.0}, {"alibi_slopes": [1.0]}])
def test_other_attention_is_refused(unsupported: dict) -> None:
    with pytest.raises(ValueError, match="another --attention-backend"):
        backend.LoopAttentionImpl(2, 64, 1.0, **unsupported)
