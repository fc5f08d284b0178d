"""Which loop's hidden state a row is read after: fixed depths, and the exit gate of arXiv 2510.25741, section 3."""

from collections.abc import Callable, Sequence

import torch

from ouro_vllm.options import Depth


def chance(exit_logits: torch.Tensor) -> torch.Tensor:
    """The gate's lambda, [N] float64, from its logits: the chance of leaving at a loop once there.

    Float64 so that products of a few of them are the same number whether a tensor or a Python float holds them.
    """
    return exit_logits.to(torch.float64).sigmoid()


class ExitPick:
    """Rows that run loops in lockstep, each of which is read after a loop of its own.

    p_t = lambda_t * prod_{s<t} (1 - lambda_s), what is left at the deepest loop; a row leaves after the first loop t,
    not before `least`, with p_1 + ... + p_t = 1 - prod_{s<=t} (1 - lambda_s) >= q.
    """

    def __init__(
        self, depths: Sequence[Depth], counts: Sequence[int], hidden: torch.Tensor, gate: Callable[..., torch.Tensor]
    ) -> None:
        """depths, counts: of so many rows each, in this order. hidden [N, D]: for shape, type and device; rows behind
        those counted are padding. gate: hidden states [n, D] -> logits [n]."""
        padding = hidden.shape[0] - sum(counts)
        table = torch.tensor(
            [[depth.loops, depth.least, depth.threshold] for depth in depths] + [[1, 1, 1.0]], dtype=torch.float64
        )
        rows = table.repeat_interleave(torch.tensor([*counts, padding]), dim=0).to(hidden.device)
        self.loops, self.least, self.threshold = rows.unbind(1)
        self.gate = gate if any(depth.gated for depth in depths) else None
        self.gated = self.threshold < 1.0
        self.staying = torch.ones_like(self.threshold)
        self.loop = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)  # 0: has not left
        self.hidden = torch.zeros_like(hidden)

    def take(self, loop: int, hidden: torch.Tensor) -> None:
        """hidden [n, D]: what the first n rows are after `loop`, 1-based; called for every loop from the first on."""
        rows = slice(0, hidden.shape[0])
        leaves = self.loops[rows] <= loop
        if self.gate is not None:
            self.staying[rows] *= 1.0 - chance(self.gate(hidden))
            reached = self.gated[rows] & (self.least[rows] <= loop) & (1.0 - self.staying[rows] >= self.threshold[rows])
            leaves = leaves | reached
        leaves = leaves & (self.loop[rows] == 0)
        self.hidden[rows] = torch.where(leaves[:, None], hidden, self.hidden[rows])
        self.loop[rows] = torch.where(leaves, loop, self.loop[rows])
