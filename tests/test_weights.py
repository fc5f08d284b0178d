"""The strict reader of checkpoints: names and shapes only, no tensors needed."""

from dataclasses import dataclass

import pytest
from checkpoints import CONFIG
from hypothesis import given
from hypothesis import strategies as st

from ouro_vllm.config import OuroConfig
from ouro_vllm.weights import CheckpointError, checked, expected_shapes


@dataclass
class Fake:
    shape: tuple[int, ...]


SHAPES = expected_shapes(OuroConfig(**CONFIG))
NAMES = sorted(SHAPES)


def whole() -> dict[str, Fake]:
    return {name: Fake(shape) for name, shape in SHAPES.items()}


def test_published_names_are_expected():
    assert len(SHAPES) == 2 * 11 + 5
    assert SHAPES["model.layers.1.post_attention_layernorm_2.weight"] == (128,)
    assert SHAPES["model.early_exit_gate.weight"] == (1, 128)
    assert "lm_head.weight" not in expected_shapes(OuroConfig(**{**CONFIG, "tie_word_embeddings": True}))


@given(st.permutations(NAMES))
def test_any_order_passes_through_untouched(order):
    tensors = whole()
    pairs = [(name, tensors[name]) for name in order]
    assert list(checked(pairs, SHAPES)) == pairs


@given(st.sampled_from(NAMES))
def test_a_missing_tensor_is_named(name):
    tensors = whole()
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor.*`{name}`"):
        list(checked(tensors.items(), SHAPES))


@given(st.sampled_from(NAMES), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_wrong_shape_is_named_with_both_shapes(name, shape):
    tensors = {**whole(), name: Fake(shape)}
    with pytest.raises(CheckpointError) as caught:
        list(checked(tensors.items(), SHAPES))
    assert name in str(caught.value) and str(shape) in str(caught.value) and str(SHAPES[name]) in str(caught.value)


@given(st.text(min_size=1).filter(lambda name: name not in SHAPES))
def test_a_surplus_tensor_is_named(name):
    with pytest.raises(CheckpointError) as caught:
        list(checked([*whole().items(), (name, Fake((1,)))], SHAPES))
    assert f"`{name}`" in str(caught.value)


def test_a_tensor_that_comes_twice_is_named():
    with pytest.raises(CheckpointError, match="`model.norm.weight` twice"):
        list(checked([*whole().items(), ("model.norm.weight", Fake((128,)))], SHAPES))


def test_a_later_update_may_bring_a_part():
    part = [("model.norm.weight", Fake((128,)))]
    assert list(checked(part, SHAPES, complete=False)) == part
    with pytest.raises(CheckpointError, match="`model.norm.wight`"):
        list(checked([("model.norm.wight", Fake((128,)))], SHAPES, complete=False))
