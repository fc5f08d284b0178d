"""Row counts that are compiled one by one."""

from types import SimpleNamespace

import torch

from ouro_vllm.model import OuroForCausalLM
from ouro_vllm.sizes import compiled, rounded


def test_few_counts_and_little_beyond_what_is_asked_for():
    sizes = [rounded(rows, "cpu") for rows in range(1, 4097)]
    assert sizes[:32] == list(range(1, 33)) and sizes == sorted(sizes)
    for rows, size in enumerate(sizes, start=1):
        assert rows <= size < rows * 17 / 16 and rounded(size, "cpu") == size
    assert len(set(sizes[:128])) == 64 and len(set(sizes)) == 32 + 16 * 7
    assert compiled(128, "cpu") == sorted(set(sizes[:128]))


def test_graphs_have_sizes_of_their_own():
    assert [rounded(rows, "cuda") for rows in (1, 33, 1000)] == [1, 33, 1000] and compiled(128, "cuda") == []


def test_readouts_are_of_rounded_rows_and_of_these_what_was_asked_for():
    asked = []
    model = SimpleNamespace(lm_head=None, logits_processor=lambda _, hidden: asked.append(len(hidden)) or 2 * hidden)
    hidden = torch.randn(33, 3)
    assert torch.equal(OuroForCausalLM.compute_logits(model, hidden), 2 * hidden) and asked == [34]
