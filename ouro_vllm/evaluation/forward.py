"""Ouro's forward over whole sequences, batched, without a cache, in eager PyTorch: what each loop makes of each token.

For measuring quality, where vLLM's forward would have to be run once per depth. Structure as in `ouro_vllm.model`.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ouro_vllm.config import OuroConfig


class Forward:
    """A checkpoint's folder, computed in float32."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for rotary settings other than the plain ones of the published checkpoints."""
        self.config = OuroConfig(**json.loads((folder / "config.json").read_text()))
        rope = self.config.rope_parameters or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"{folder}: rotary embedding of type {rope['rope_type']!r}; only the default is known here."
            )
        size = self.config.head_dim
        self.speed = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        self.w: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.w |= {name: tensor.float() for name, tensor in load_file(file).items()}
        self.head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])

    @torch.inference_mode()
    def loops(self, ids: Tensor, loops: int) -> list[Tensor]:
        """Token ids [B, T] -> normalised hidden states [B, T, D] after each of `loops` loops."""
        angle = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * self.speed
        turn = torch.cat([angle, angle], -1)
        turn = turn.cos().float(), turn.sin().float()
        x, states = self.w["model.embed_tokens.weight"][ids], []
        for _ in range(loops):
            for layer in range(self.config.num_hidden_layers):
                x = self._layer(x, f"model.layers.{layer}.", turn)
            x = self._norm(x, "model.norm")
            states.append(x)
        return states

    @torch.inference_mode()
    def readout(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return F.linear(hidden, self.head)

    @torch.inference_mode()
    def gate(self, hidden: Tensor) -> Tensor:
        """[..., D] -> the exit gate's logits [...]."""
        name = "model.early_exit_gate."
        return F.linear(hidden, self.w[name + "weight"], self.w[name + "bias"])[..., 0]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[name + ".weight"], self.config.rms_norm_eps)

    def _layer(self, x: Tensor, name: str, turn: tuple[Tensor, Tensor]) -> Tensor:
        y = self._attention(self._norm(x, name + "input_layernorm"), name + "self_attn.", turn)
        x = x + self._norm(y, name + "input_layernorm_2")
        y = self._norm(x, name + "post_attention_layernorm")
        gated = F.silu(F.linear(y, self.w[name + "mlp.gate_proj.weight"]))
        y = F.linear(gated * F.linear(y, self.w[name + "mlp.up_proj.weight"]), self.w[name + "mlp.down_proj.weight"])
        return x + self._norm(y, name + "post_attention_layernorm_2")

    def _attention(self, x: Tensor, name: str, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape

        def heads(part: str) -> Tensor:
            y = F.linear(x, self.w[f"{name}{part}.weight"])
            return y.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        q, k, v = _rotated(heads("q_proj"), turn), _rotated(heads("k_proj"), turn), heads("v_proj")
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return F.linear(y.transpose(1, 2).flatten(2), self.w[name + "o_proj.weight"])


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """[B, heads, T, size] with each position's pairs (i, i + size / 2) turned."""
    a, b = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-b, a], -1) * turn[1]
