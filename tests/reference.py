"""Ouro in plain PyTorch float32, from the paper's description (arXiv 2510.25741, sections 2 and 3): the yardstick.

Shares no code with the plugin or the training script. No cache, no batching, no fusing: one whole sequence.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Depth:
    """What one loop leaves behind for a sequence of T tokens."""

    hidden: Tensor  # [T, D], after the final norm
    logits: Tensor  # [T, V]
    exit_logit: Tensor  # [T], the gate before its sigmoid


class Reference:
    """A checkpoint folder, read into float32."""

    def __init__(self, folder: str | Path) -> None:
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.w = {name: t.float() for name, t in load_file(Path(folder) / "model.safetensors").items()}

    def run(self, ids: list[int], loops: int | None = None) -> list[Depth]:
        """Token ids -> one Depth per loop, for `loops` loops (default: the checkpoint's own number)."""
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        depths = []
        for _ in range(loops or self.config["total_ut_steps"]):
            for layer in range(self.config["num_hidden_layers"]):
                x = self.layer(x, f"model.layers.{layer}.")
            x = self.norm(x, "model.norm.weight")
            gate = x @ self.w["model.early_exit_gate.weight"][0] + self.w["model.early_exit_gate.bias"]
            head = "lm_head.weight" if "lm_head.weight" in self.w else "model.embed_tokens.weight"
            depths.append(Depth(hidden=x, logits=x @ self.w[head].T, exit_logit=gate))
        return depths

    def layer(self, x: Tensor, name: str) -> Tensor:
        y = self.norm(x, name + "input_layernorm.weight")
        y = self.attention(y, name + "self_attn.")
        x = x + self.norm(y, name + "input_layernorm_2.weight")
        y = self.norm(x, name + "post_attention_layernorm.weight")
        y = self.mlp(y, name + "mlp.")
        return x + self.norm(y, name + "post_attention_layernorm_2.weight")

    def norm(self, x: Tensor, weight: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * self.w[weight]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = x @ self.w[name + "gate_proj.weight"].T
        up = x @ self.w[name + "up_proj.weight"].T
        return (gate / (1 + (-gate).exp()) * up) @ self.w[name + "down_proj.weight"].T

    def attention(self, x: Tensor, name: str) -> Tensor:
        heads = self.config["num_attention_heads"]
        pairs = self.config.get("num_key_value_heads") or heads
        length, size = len(x), self.config.get("head_dim") or self.config["hidden_size"] // heads
        q = (x @ self.w[name + "q_proj.weight"].T).view(length, heads, size)
        k = (x @ self.w[name + "k_proj.weight"].T).view(length, pairs, size)
        v = (x @ self.w[name + "v_proj.weight"].T).view(length, pairs, size)
        q, k = self.rotate(q), self.rotate(k)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out = []
        for head in range(heads):
            pair = head // (heads // pairs)
            score = q[:, head] @ k[:, pair].T / math.sqrt(size)
            out.append(score.masked_fill(future, -math.inf).softmax(-1) @ v[:, pair])
        return torch.cat(out, -1) @ self.w[name + "o_proj.weight"].T

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on [T, heads, size]: dimension i turns with i + size/2 by position * theta^(-2i/size)."""
        length, _, size = x.shape
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        speed = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
        cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def exit_loops(depths: list[Depth], threshold: float, least: int = 1) -> Tensor:
    """The first loop, not before `least`, by which the chance of having left reaches the threshold -> [T], 1-based."""
    reached = exit_distribution(depths).cumsum(0) >= threshold
    reached[: least - 1] = False
    reached[-1] = True
    return (reached.int().argmax(0) if threshold < 1 else torch.full_like(reached[0], len(depths) - 1, dtype=int)) + 1


def logits_at(depths: list[Depth], loops: Tensor) -> Tensor:
    """What each token is read as, after a loop of its own: loops [T] -> logits [T, V]."""
    return torch.stack([depths[loop - 1].logits[row] for row, loop in enumerate(loops.tolist())])


def exit_distribution(depths: list[Depth]) -> Tensor:
    """p_t = lambda_t * prod_{s<t} (1 - lambda_s), the rest of the mass at the last loop. -> [R, T]"""
    left = torch.ones_like(depths[0].exit_logit)
    p = []
    for depth in depths[:-1]:
        chance = torch.sigmoid(depth.exit_logit)
        p.append(left * chance)
        left = left * (1 - chance)
    return torch.stack([*p, left])
