"""The ways of decoding that are compared, as options of vLLM's `LLM`. Pure Python."""

from typing import Any

from ouro_vllm.names import PLUGIN
from ouro_vllm.speculation import SPECULATOR

BASE = "plain"  # what all are compared with
MODES = {
    BASE: "all loops one after the other",
    "draft-verify": "the textbook method: some drafts at depth 1, then one verification",
    "wavefront": "self-speculation as served: adapts to what passes cost on this machine",
    "wavefront-full": "self-speculation that feeds every first readout: its counts do not depend on the machine",
    "plain-eager": "plain without compilation",
}


def speculative(mode: str) -> bool:
    """Whether the mode drafts."""
    return not mode.startswith(BASE)


def engine_options(mode: str, passes: int, drafts: int) -> dict[str, Any]:
    """What sets a mode's engine apart. passes: per engine step, of the wavefront; drafts: per verification."""
    if not speculative(mode):
        return {"enforce_eager": True} if mode == "plain-eager" else {}
    textbook = mode == "draft-verify"
    config = {"method": "custom_class", "model": SPECULATOR, "num_speculative_tokens": drafts if textbook else passes}
    own = {"draft-verify": {"speculation": "draft-verify"}, "wavefront-full": {"entry_loop": 1}}.get(mode, {})
    return {"speculative_config": config, "additional_config": {PLUGIN: own}}
