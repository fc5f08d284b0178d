"""`ouro-vllm widen`: a larger checkpoint with the same function: a small trained model at a big one's cost.

How each size grows without changing a logit beyond rounding:
- hidden units are copied: a multiple keeps every RMS norm as it is, and what reads them reads each copy's share;
- heads are added that write nothing: their queries, keys and values are zero, and so are their columns of the output;
- inner units of the MLP are added the same way;
- layers are added whose two closing norms have weight zero, so that both of their updates vanish.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ouro_vllm.checkpoint import read_config, read_weights
from ouro_vllm.config import OuroConfig
from ouro_vllm.weights import expected_shapes


class WidenError(ValueError):
    """A size that cannot be had from this checkpoint; the message names it and what is possible."""


@dataclass(frozen=True)
class Sizes:
    """What the larger checkpoint has; None keeps the source's size (heads then follow the hidden size)."""

    hidden: int | None = None
    layers: int | None = None
    intermediate: int | None = None


def widen(source: Path, target: Path, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Write the larger checkpoint to `target` (tokenizer and chat template are copied). Returns its config.json.

    Raises:
        WidenError: a size is impossible, or `target` is no new or empty folder.
        CheckpointError: the source is no checkpoint, or its files do not fit each other.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WidenError(f"{target} is not an empty folder: name a new one.")
    config = read_config(source)
    weights = read_weights(source, config)
    new = larger(json.loads((source / "config.json").read_text()), config, sizes)
    weights = grown(weights, config, OuroConfig(**new), torch.Generator().manual_seed(seed))
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name.startswith(("tokenizer", "generation", "chat", "prompts")):
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(new, indent=2) + "\n")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return new


def larger(old: dict[str, Any], config: OuroConfig, sizes: Sizes) -> dict[str, Any]:
    """The config.json of the larger checkpoint.

    Raises:
        WidenError: a size below the source's, a hidden size that is not a power of two times it, tied embeddings.
    """
    hidden = sizes.hidden or config.hidden_size
    copies, rest = divmod(hidden, config.hidden_size)
    # Powers of two, because a copy's share is the weight divided by their number: exact in any floating format.
    if rest or copies < 1 or copies & (copies - 1):
        raise WidenError(f"--hidden {hidden}: must be {config.hidden_size} times 1, 2, 4, 8, ...")
    if copies > 1 and config.tie_word_embeddings:
        # One matrix cannot both be copied, as the embedding is, and shared out, as the readout is.
        raise WidenError(f"--hidden {hidden}: the source ties its embeddings, which cannot be widened.")
    layers = sizes.layers or config.num_hidden_layers
    inner = sizes.intermediate or config.intermediate_size
    for flag, value, least in (
        ("--layers", layers, config.num_hidden_layers),
        ("--intermediate", inner, config.intermediate_size),
    ):
        if value < least:
            raise WidenError(f"{flag} {value}: must be at least the source's {least}.")
    return old | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads * copies,
        "num_key_value_heads": config.num_key_value_heads * copies,
        "head_dim": config.head_dim,
        "layer_types": ["full_attention"] * layers,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def grown(weights: dict[str, Tensor], old: OuroConfig, new: OuroConfig, dice: torch.Generator) -> dict[str, Tensor]:
    """The larger checkpoint's tensors from the smaller one's, same dtype."""
    copies = new.hidden_size // old.hidden_size
    tensors: dict[str, Tensor] = {}
    for name, shape in expected_shapes(new).items():
        if name not in weights:
            tensors[name] = idle(name, shape, dice).to(weights["model.norm.weight"].dtype)
            continue
        tensor = weights[name]
        if tensor.dim() == 1 and name.endswith("bias"):
            tensors[name] = tensor.clone()
        elif tensor.dim() == 1:
            tensors[name] = tensor.repeat(copies)
        elif name == "model.embed_tokens.weight":
            tensors[name] = tensor.repeat(1, copies)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = padded(tensor, tensor.shape[0], shape[1]).repeat(copies, 1)
        else:
            tensors[name] = padded((tensor / copies).repeat(1, copies), *shape)
    return tensors


def padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """`tensor` in the top left corner of zeros [rows, columns]."""
    result = tensor.new_zeros(rows, columns)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result


def idle(name: str, shape: tuple[int, ...], dice: torch.Generator) -> Tensor:
    """A tensor of an added layer: random like a trained one's, but for the closing norms, which silence it."""
    if len(shape) == 1:
        return torch.zeros(shape) if "layernorm_2" in name else torch.ones(shape)
    return torch.randn(shape, generator=dice) * shape[-1] ** -0.5


def looped_parameters(config: dict[str, Any]) -> int:
    """How many parameters the shared stack of a config.json has: what every loop reads."""
    shapes = expected_shapes(OuroConfig(**config))
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model.layers."))
