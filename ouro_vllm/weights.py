"""Strict reading of a checkpoint: which tensors it must hold, and a check of each as it streams past.

Pure Python on names and shapes; the tensors go through untouched.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

Shape = tuple[int, ...]


class HasShape(Protocol):
    shape: Any


Tensor = TypeVar("Tensor", bound=HasShape)


class CheckpointError(ValueError):
    """A checkpoint that does not fit its config.json; the message names the tensors."""


def expected_shapes(config: Any) -> dict[str, Shape]:
    """Name -> shape of every tensor of a published Ouro checkpoint with this `config.json`.

    `lm_head.weight` is left out where the embeddings are tied.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, pairs = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (pairs, hidden),
        "self_attn.v_proj.weight": (pairs, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "input_layernorm_2.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "post_attention_layernorm_2.weight": (hidden,),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {
        "model.norm.weight": (hidden,),
        "model.early_exit_gate.weight": (1, hidden),
        "model.early_exit_gate.bias": (1,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def checked(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, Shape], complete: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Pass (name, tensor) pairs on; every name of `shapes` must come by exactly once, in its shape.

    Where the embeddings are tied but the checkpoint has an `lm_head.weight`, vLLM unties them in the configuration
    before it loads (`ModelConfig.maybe_untie_word_embeddings`). complete=False lets names be missing.

    Raises:
        CheckpointError: on the first tensor that is surplus, doubled or of a wrong shape; at the end, with every
            name that is missing.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise CheckpointError(f"The checkpoint holds tensor `{name}` twice.")
        seen.add(name)
        wanted = shapes.get(name)
        if wanted is None:
            raise CheckpointError(
                f"The checkpoint holds tensor `{name}`, which an Ouro model with this config.json does not have. "
                "Check `num_hidden_layers` and that the file belongs to this config."
            )
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"The checkpoint's tensor `{name}` has shape {tuple(tensor.shape)}; config.json asks for {wanted}."
            )
        yield name, tensor
    missing = [name for name in shapes if name not in seen]
    if missing and complete:
        listed = ", ".join(f"`{name}`" for name in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(f"The checkpoint lacks {len(missing)} tensor(s): {listed}.")
