"""Sharing of keys and values across loops in plain PyTorch, token by token: what `kv_sharing` is compared with.

Shares no code with the plugin. A token of the prompt reads its own loop; a generated one reads its own loop from its
window's start on, and before that what is shared.
"""

import math

import torch
from reference import Reference
from torch import Tensor


class SharedReference(Reference):
    """A checkpoint whose generated tokens read shared keys and values.

    policy: "per_loop", "last" or "average". window: newest tokens read from the own loop. block: the window's start is
    rounded down to a multiple of it.
    """

    def __init__(self, folder, policy: str, window: int, block: int) -> None:
        super().__init__(folder)
        self.policy, self.window, self.block = policy, window, block

    def logits(self, ids: list[int], prompt: int) -> Tensor:
        """Logits [T, V] after the last loop of every token; the first `prompt` tokens are the prompt."""
        self.loops, self.layers = self.config["total_ut_steps"], self.config["num_hidden_layers"]
        # stored[loop][layer]: [T, KV heads, size], NaN where nothing has been written.
        self.stored = [[[None, None] for _ in range(self.layers)] for _ in range(self.loops)]
        self.prompt = prompt
        out = [self.rows(ids, range(prompt), len(ids))]
        out += [self.rows(ids, range(position, position + 1), len(ids)) for position in range(prompt, len(ids))]
        return torch.cat(out)

    def rows(self, ids: list[int], positions: range, length: int) -> Tensor:
        """Logits of these positions, all loops; what they read before them is final."""
        self.positions, self.length = torch.tensor(list(positions)), length
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)[self.positions]]
        for loop in range(self.loops):
            for layer in range(self.layers):
                self.loop, self.at = loop, layer
                x = self.layer(x, f"model.layers.{layer}.")
            x = self.norm(x, "model.norm.weight")
        head = "lm_head.weight" if "lm_head.weight" in self.w else "model.embed_tokens.weight"
        return x @ self.w[head].T

    def attention(self, x: Tensor, name: str) -> Tensor:
        heads = self.config["num_attention_heads"]
        pairs = self.config.get("num_key_value_heads") or heads
        size = self.config.get("head_dim") or self.config["hidden_size"] // heads
        q, k, v = (
            (x @ self.w[f"{name}{which}_proj.weight"].T).view(len(x), count, size)
            for which, count in (("q", heads), ("k", pairs), ("v", pairs))
        )
        whole = torch.zeros(self.length, max(heads, pairs), size)
        for tensor in (q, k):  # the reference rotates whole sequences
            placed = whole[:, : tensor.shape[1]].clone()
            placed[self.positions] = tensor
            tensor.copy_(self.rotate(placed)[self.positions])
        own = self.stored[self.loop][self.at]
        for number, fresh in enumerate((k, v)):
            if own[number] is None:
                own[number] = torch.full((self.length, pairs, size), math.nan)
            own[number][self.positions] = fresh
        out = []
        for row, position in enumerate(self.positions.tolist()):
            start = 0
            if position >= self.prompt and self.policy != "per_loop":
                start = max(0, position - self.window + 1) // self.block * self.block
            keys, values = (
                torch.cat([self.shared(number)[:start], own[number][start : position + 1]])
                if start
                else own[number][: position + 1]
                for number in (0, 1)
            )
            each = [
                (keys[:, head * pairs // heads] @ q[row, head] / math.sqrt(size)).softmax(0)
                @ values[:, head * pairs // heads]
                for head in range(heads)
            ]
            out.append(torch.cat(each))
        return torch.stack(out) @ self.w[name + "o_proj.weight"].T

    def shared(self, number: int) -> Tensor:
        """Keys (0) or values (1) of this layer that all loops read: [T, KV heads, size]."""
        loops = [self.stored[loop][self.at][number] for loop in range(self.loops)]
        return loops[-1] if self.policy == "last" else torch.stack(loops).mean(0)
