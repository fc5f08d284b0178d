"""Small checkpoints with random weights, for what does not depend on what a model has learnt: shapes and errors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ouro_vllm.config import OuroConfig
from ouro_vllm.weights import expected_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "vocab_size": 163,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "total_ut_steps": 3,
    "torch_dtype": "float32",
}


def write(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint in `folder` whose config.json is CONFIG with `changes`; a change to None removes the field."""
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(OuroConfig(**{**config, "total_ut_steps": 1})).items():
        value = torch.randn(shape, generator=generator)
        tensors[name] = value * 0.3 + 1 if "norm" in name else value * shape[-1] ** -0.5 if len(shape) == 2 else value
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace, add or (None) remove tensors; underscores doubled stand for dots: `model__norm__weight`."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder
