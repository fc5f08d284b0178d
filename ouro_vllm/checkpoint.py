"""A checkpoint's folder, read without vLLM: for `evaluation` and `widen`."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ouro_vllm.config import OuroConfig, check
from ouro_vllm.weights import CheckpointError, checked, expected_shapes


def read_config(folder: Path) -> OuroConfig:
    """config.json of the folder. Raises CheckpointError naming what is missing or cannot be."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json: name a checkpoint's folder.")
    try:
        config = OuroConfig(**json.loads(file.read_text()))
        check(config)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from None
    return config


def read_weights(folder: Path, config: OuroConfig, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Name -> tensor, in `dtype` or as it is stored.

    An `lm_head.weight` beside tied embeddings is used, as vLLM does, and `config` is untied for it.

    Raises:
        CheckpointError: there are no weights, or they do not fit the config.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors: name the folder of a downloaded checkpoint.")
    try:
        found = [(name, tensor.to(dtype or tensor.dtype)) for file in files for name, tensor in load_file(file).items()]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {folder} cannot be read: {error}") from None
    if any(name == "lm_head.weight" for name, _ in found):
        config.tie_word_embeddings = False
    return dict(checked(found, expected_shapes(config)))
