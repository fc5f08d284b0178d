"""The ways of decoding that are compared, as options of vLLM's `LLM`. Pure Python."""

from typing import Any

from ouro_vllm.names import PLUGIN
from ouro_vllm.sharing import PER_LOOP
from ouro_vllm.speculation import SPECULATOR

BASE = "plain"  # what all are compared with
MODES = {
    BASE: "all loops one after the other",
    "draft-verify": "the textbook method: some drafts at depth 1, then one verification",
    "wavefront": "self-speculation as served: adapts to what passes cost on this machine",
    "wavefront-full": "self-speculation that feeds every first readout: its counts do not depend on the machine",
    "wavefront-off": "the server of `wavefront`, asked by requests that are not drafted for",
    "plain-again": "plain in another engine: what two engines of one kind differ by on this machine",
    "plain-eager": "plain without compilation",
}
ASKED: dict[str, dict[str, Any]] = {"wavefront-off": {"ouro_speculate": 0}}  # by every request, in `vllm_xargs`


def method(mode: str) -> str:
    """The mode without its policy of KV sharing: `wavefront+last` -> `wavefront`."""
    return mode.partition("+")[0]


def with_sharing(modes: list[str], policies: list[str]) -> list[str]:
    """The modes, and each of them once more for every policy that shares."""
    shared = [f"{mode}+{policy}" for mode in modes for policy in policies if policy != PER_LOOP]
    return modes + shared


def speculative(mode: str) -> bool:
    """Whether the mode drafts."""
    return not mode.startswith(BASE)


def engine_options(mode: str, passes: int, drafts: int, window: int) -> dict[str, Any]:
    """What sets a mode's engine apart.

    passes: per engine step, of the wavefront; drafts: per verification; window: of `kv_sharing`.
    """
    way, _, policy = mode.partition("+")
    own: dict[str, Any] = {"draft-verify": {"speculation": "draft-verify"}, "wavefront-full": {"entry_loop": 1}}.get(
        way, {}
    )
    if policy:
        own = {**own, "kv_sharing": policy, "kv_window": window}
    options: dict[str, Any] = {"additional_config": {PLUGIN: own}} if own or speculative(way) else {}
    if way == "plain-eager":
        options["enforce_eager"] = True
    if speculative(way):
        count = drafts if way == "draft-verify" else passes
        options["speculative_config"] = {
            "method": "custom_class",
            "model": SPECULATOR,
            "num_speculative_tokens": count,
        }
    return options
