"""The looped transformer as it is trained: a differentiable Ouro in plain PyTorch, no cache, whole sequences only.

Only `train.py` and `evaluate.py` use it. Serving is `ouro_vllm.model`; the tests have a reference of their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a looped model; names as in the published `config.json` where one exists."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    total_ut_steps: int = 4
    max_position_embeddings: int = 16384
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), init))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, size = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Written out: compiled, this trains faster on a CPU than the fused attention, whose backward is slow there.
        score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        y = score.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, size))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Sandwich norms: before and after attention, before and after the MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(size, eps)
        self.input_layernorm_2 = RMSNorm(size, eps, init=0.5)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm_2 = RMSNorm(size, eps, init=0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class Stack(nn.Module):
    """Embedding, the shared stack, the norm that ends every loop, and the exit gate: the published `model.` tree."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.early_exit_gate = nn.Linear(shape.hidden_size, 1)

    def loop(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class LoopedLM(nn.Module):
    """`forward(ids)` returns the normalised hidden state after each loop; `readout` turns one into logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Stack(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.5 if "embed_tokens" in name else p.shape[1] ** -0.5
                nn.init.normal_(p, std=scale)
        nn.init.zeros_(self.model.early_exit_gate.weight)
        nn.init.zeros_(self.model.early_exit_gate.bias)

    def forward(self, ids: Tensor, loops: int | None = None) -> list[Tensor]:
        """ids [B, T] -> R tensors [B, T, hidden_size]."""
        cos, sin = rope(ids.shape[1], self.shape.head_dim, self.shape.rope_theta)
        x, states = self.model.embed_tokens(ids), []
        for _ in range(loops or self.shape.total_ut_steps):
            x = self.model.loop(x, cos, sin)
            states.append(x)
        return states

    def readout(self, state: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size] in float32."""
        return self.lm_head(state).float()

    def gate(self, state: Tensor) -> Tensor:
        """[..., hidden_size] -> logit of the exit probability lambda [...], float32 whatever autocast says."""
        with torch.autocast("cpu", enabled=False):
            return self.model.early_exit_gate(state.float()).squeeze(-1)


def rope(length: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim] for positions 0..T-1, the two halves of a head rotated against each other."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, H, T, dim]."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def exit_distribution(gates: Tensor) -> Tensor:
    """Gate logits [R, ...] -> probability of exiting at each loop [R, ...]; the last loop takes what is left."""
    stay = F.logsigmoid(-gates).cumsum(0)
    before = torch.cat((torch.zeros_like(stay[:1]), stay[:-1]))
    return torch.cat(((F.logsigmoid(gates[:-1]) + before[:-1]).exp(), before[-1:].exp()))
