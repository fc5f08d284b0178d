"""Which loop a pass of the stack belongs to: the KV cache it writes and reads.

The stack is compiled once, so its graph names one attention layer per physical layer (that of loop 1). What differs
from loop to loop is outside the graph: vLLM's forward context maps layer names to attention layers (with their KV
cache), metadata and slots, and it is that map which is exchanged here (vllm/forward_context.py, `get_attention_context`
in vllm/model_executor/layers/attention/attention.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vllm.forward_context import get_forward_context, override_forward_context


def layer_name(prefix: str, layer: int, loop: int, layers: int) -> str:
    """vLLM's name of the attention of physical `layer` (0-based) at `loop` (1-based).

    One number per name, counted on from loop to loop: vLLM reads it as the layer's index.
    """
    return f"{prefix}.layers.{(loop - 1) * layers + layer}.self_attn.attn"


class LoopCaches:
    """Points the graph's attention layers at the KV cache of one loop."""

    def __init__(self, prefix: str, layers: int, loops: int) -> None:
        graph = [layer_name(prefix, layer, 1, layers) for layer in range(layers)]
        self._names = [
            {name: layer_name(prefix, layer, loop, layers) for layer, name in enumerate(graph)}
            for loop in range(1, loops + 1)
        ]

    @contextmanager
    def at(self, loop: int) -> Iterator[None]:
        """Run the body with loop `loop`'s (1-based) caches behind the graph's layer names."""
        if loop == 1:
            yield
            return
        names, context = self._names[loop - 1], get_forward_context()
        here = replace(
            context,
            no_compile_layers=_pick(context.no_compile_layers, names),
            attn_metadata=_pick(context.attn_metadata, names),
            slot_mapping=_pick(context.slot_mapping, names),
        )
        with override_forward_context(here):
            yield


def _pick(table: Any, names: Mapping[str, str]) -> Any:
    """`table` seen under the graph's names. Profiling runs have no metadata and no slots: nothing to pick then."""
    if not table:
        return table
    return {name: table[target] for name, target in names.items()}
