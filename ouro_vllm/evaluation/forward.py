"""The looped forward with a KV cache per loop and one that loops share: batched, float32, plain PyTorch.

Structure as in `ouro_vllm.model` (arXiv 2510.25741, section 2). Shapes: B sequences of the same length, c rows of each
in one call, D = hidden_size, H = head_dim, G key-value heads, T positions, R loops, L layers.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_vllm.checkpoint import read_config, read_weights
from ouro_vllm.config import OuroConfig
from ouro_vllm.evaluation.policies import CONTROL, EvalError, Setting
from ouro_vllm.sharing import AVERAGE, LAST

KEYS, VALUES = 0, 1


class Cache:
    """KV of every loop, and the shared KV under a policy, for B sequences of up to `positions` tokens.

    What has not been written is NaN, so that reading it cannot go unnoticed.
    """

    def __init__(self, config: OuroConfig, sequences: int, positions: int) -> None:
        layers, pairs, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.own = torch.full((2, config.total_ut_steps, layers, sequences, pairs, positions, size), math.nan)
        self.shared: Tensor | None = None  # [2, L, B, G, T, H]
        self.averages = False
        self.length = 0

    def rewind(self, length: int, policy: str) -> None:
        """Forget all positions from `length` on, and share by `policy` from now on."""
        self.own[..., length:, :] = math.nan
        self.averages = policy == AVERAGE
        if self.averages:
            self.shared = torch.full_like(self.own[:, 0], math.nan)
        else:
            self.shared = {LAST: self.own[:, -1], CONTROL: self.own[:, 0]}.get(policy)
        self.length = 0
        self.finish(length)

    def finish(self, length: int) -> None:
        """All loops have written the positions before `length`: their shared KV is final."""
        if self.averages:
            new = slice(self.length, length)
            self.shared[..., new, :] = self.own[..., new, :].mean(1)
        self.length = length


class Looped:
    """A checkpoint's folder, read into float32."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: there is no checkpoint, or its files do not fit each other.
            EvalError: it cannot be evaluated here.
        """
        self.config = read_config(folder)
        rope = self.config.rope_parameters or {}
        if rope.keys() - {"type"} != {"rope_type", "rope_theta"} or rope["rope_type"] != "default":
            raise EvalError(
                f"{folder}/config.json: the forward knows rotary positions of `rope_type` 'default' only; there they "
                f"are {rope}."
            )
        self.weights = read_weights(folder, self.config, torch.float32)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., D]."""
        return self.weights["model.embed_tokens.weight"][ids]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] after any loop -> [..., V]."""
        tied = "lm_head.weight" not in self.weights
        return hidden @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def gate(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] after any loop -> the exit gate's logits [...]."""
        name = "model.early_exit_gate."
        return F.linear(hidden, self.weights[name + "weight"], self.weights[name + "bias"])[..., 0]

    def read(self, ids: Tensor) -> list[Tensor]:
        """Whole sequences, ids [B, T], as prompts -> hidden states [B, T, D] after each loop."""
        return self.extend(ids, Cache(self.config, *ids.shape))

    def extend(self, ids: Tensor, cache: Cache, starts: list[int] | None = None) -> list[Tensor]:
        """Run all loops over the next c tokens of each sequence, ids [B, c]. -> hidden states [B, c, D] after each.

        starts: for each of the c rows the first position whose own-loop KV it reads (`Setting.start`), not falling;
        None is 0 for all: own-loop KV everywhere, as in a prompt.

        Raises:
            ValueError: a row would read shared KV that is not final before this call.
        """
        begin, end = cache.length, cache.length + ids.shape[1]
        reads = Reads(begin, end, starts or [0] * (end - begin))
        turns = turning(self.config, begin, end)
        hidden, states = self.embed(ids), []
        for loop in range(self.config.total_ut_steps):
            for layer in range(self.config.num_hidden_layers):
                own = cache.own[:, loop, layer]
                shared = None if cache.shared is None else cache.shared[:, layer]
                hidden = self.layer(hidden, f"model.layers.{layer}.", turns, own, shared, reads)
            hidden = self.norm(hidden, "model.norm")
            states.append(hidden)
        cache.finish(end)
        return states

    def layer(self, x: Tensor, name: str, turns: Tensor, own: Tensor, shared: Tensor | None, reads: "Reads") -> Tensor:
        """x [B, c, D] -> the same, its keys and values written to `own` [2, B, G, T, H]."""
        update = self.norm(x, name + "input_layernorm")
        update = self.attention(update, name + "self_attn.", turns, own, shared, reads)
        x = x + self.norm(update, name + "input_layernorm_2")
        update = self.norm(x, name + "post_attention_layernorm")
        update = F.silu(self.linear(update, name + "mlp.gate_proj")) * self.linear(update, name + "mlp.up_proj")
        return x + self.norm(self.linear(update, name + "mlp.down_proj"), name + "post_attention_layernorm_2")

    def attention(
        self, x: Tensor, name: str, turns: Tensor, own: Tensor, shared: Tensor | None, reads: "Reads"
    ) -> Tensor:
        batch, rows, _ = x.shape
        pairs, size = self.config.num_key_value_heads, self.config.head_dim
        query, key, value = (
            self.linear(x, f"{name}{part}_proj").view(batch, rows, -1, size).transpose(1, 2) for part in "qkv"
        )
        own[KEYS, :, :, reads.begin : reads.end] = rotate(key, turns)
        own[VALUES, :, :, reads.begin : reads.end] = value
        # Query heads that read one key-value head stand together: [B, G, heads per G x c, H].
        query = rotate(query, turns).reshape(batch, pairs, -1, size) * size**-0.5
        recent = own[..., reads.first : reads.end, :]
        if reads.last == 0:
            update = reads.weights(query @ recent[KEYS].mT) @ recent[VALUES]
        else:
            older = shared[..., : reads.last, :]
            # Two products instead of one over joined keys: joining would copy the cache for every row.
            weights = reads.weights(torch.cat((query @ older[KEYS].mT, query @ recent[KEYS].mT), -1))
            update = weights[..., : reads.last] @ older[VALUES] + weights[..., reads.last :] @ recent[VALUES]
        update = update.view(batch, -1, rows, size).transpose(1, 2).reshape(batch, rows, -1)
        return self.linear(update, name + "o_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.config.rms_norm_eps)


class Reads:
    """Which KV the rows of positions begin..end-1 read: shared at 0..last-1, own-loop at first..end-1, less a mask."""

    def __init__(self, begin: int, end: int, starts: list[int]) -> None:
        self.begin, self.end = begin, end
        self.first, self.last = starts[0], starts[-1]
        if self.last > begin:
            raise ValueError(f"position {end - 1} reads shared KV up to {self.last - 1}, final only before {begin}")
        start, row = torch.tensor(starts)[:, None], torch.arange(begin, end)[:, None]
        older, recent = torch.arange(self.last), torch.arange(self.first, end)
        self.unread = torch.cat((older >= start, (recent < start) | (recent > row)), 1)  # [c, columns]

    def weights(self, scores: Tensor) -> Tensor:
        """Scores [B, G, heads per G x c, columns] -> attention weights, 0 where a row does not read."""
        by_row = scores.unflatten(2, (-1, self.end - self.begin))
        return by_row.masked_fill_(self.unread, -math.inf).softmax(-1).flatten(2, 3)


def turning(config: OuroConfig, begin: int, end: int) -> Tensor:
    """Cosines and sines [2, c, H / 2] of the rotary positions begin..end-1."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.arange(begin, end, dtype=torch.float64)[:, None] * config.rope_parameters["rope_theta"] ** -half
    return torch.stack((angle.cos(), angle.sin())).float()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, heads, c, H] with the two halves of a head turned against each other."""
    (cos, sin), (a, b) = turns, x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def follow(model: Looped, ids: Tensor, cache: Cache, prompt: int, setting: Setting) -> Tensor:
    """Read ids [B, T] from position `prompt` on as generated tokens -> hidden states [B, T - prompt, D] of loop R.

    cache: holds the prompt's KV; afterwards all positions'.
    """
    cache.rewind(prompt, setting.policy)
    pieces = []
    for begin, end in setting.steps(prompt, ids.shape[1]):
        starts = [setting.start(position) for position in range(begin, end)]
        pieces.append(model.extend(ids[:, begin:end], cache, starts)[-1])
    return torch.cat(pieces, 1)
