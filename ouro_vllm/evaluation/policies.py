"""Which KV a row reads under each sharing policy. Pure Python; the rule is the server's (`ouro_vllm.sharing`)."""

from dataclasses import dataclass

from ouro_vllm import sharing
from ouro_vllm.sharing import AVERAGE, LAST

BASE = sharing.PER_LOOP  # what all are compared with: the model as trained
CONTROL = "first"  # must fail clearly, or the measurement cannot be believed; not served
POLICIES = {
    BASE: "every loop reads the KV it wrote",
    LAST: "behind the window every loop reads what the last one wrote",
    AVERAGE: "behind the window every loop reads the mean over the loops",
    CONTROL: "behind the window every loop reads what the first one wrote: the control, for the evaluation only",
}


class EvalError(ValueError):
    """Input that cannot be evaluated; the message names it and the mend."""


@dataclass(frozen=True)
class Setting:
    """A policy and how far back a generated token still reads its own loop's KV.

    window: tokens, the reading one among them; 0 is 1, for no row can read itself as shared. block: the window's start
    is rounded down to a multiple of it (a server's KV block; 1 is exact to the token).

    Raises:
        EvalError: an unknown policy, a negative window, a block below 1.
    """

    policy: str
    window: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise EvalError(f"Unknown KV sharing policy {self.policy!r}: there are {', '.join(POLICIES)}.")
        if self.window < 0:
            raise EvalError(f"KV window {self.window}: name 0 or more tokens.")
        if self.block < 1:
            raise EvalError(f"KV block of {self.block} tokens: name 1 or more.")

    @property
    def shares(self) -> bool:
        return self.policy != BASE

    def start(self, position: int) -> int:
        """First position whose own-loop KV the generated token at `position` reads; before it, it reads shared KV."""
        return self._rule.start(position, 0) if self.shares else 0

    def steps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Cut generated positions begin..end-1 so that what a row reads of shared KV lies before its own piece."""
        runs = self._rule.runs(begin, end, begin) if self.shares else [(begin, end)]
        return [(first, until) for first, until in runs if first < until]

    @property
    def _rule(self) -> sharing.Sharing:
        return sharing.Sharing(self.policy, max(1, self.window), self.block)
