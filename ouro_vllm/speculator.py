"""What `--speculative-config '{"method": "custom_class", "model": "ouro_vllm.SelfSpeculator", ...}'` names.

There is no draft model: the model's own early loops draft. The work is done by the model runner (`ouro_vllm.runner`),
because drafting needs the target's KV cache, hidden states and batch. vLLM makes one of these and asks it to propose;
the runner answers in its stead.
"""

from typing import Any


class SelfSpeculator:
    """Marks a server as self-speculating."""

    def __init__(self, vllm_config: Any) -> None:
        """Raises ValueError where the model is not Ouro."""
        from ouro_vllm.names import ARCHITECTURE

        architectures = vllm_config.model_config.architectures
        if ARCHITECTURE not in architectures:
            raise ValueError(f"ouro_vllm.SelfSpeculator drafts for {ARCHITECTURE}; this model is {architectures}.")

    def load_model(self, model: Any) -> None:
        """There is nothing to load."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Not called under Ouro's runner.

        Raises:
            RuntimeError: another model runner called it.
        """
        raise RuntimeError(
            "ouro_vllm.SelfSpeculator was asked to propose by a model runner that is not Ouro's. It needs vLLM's V1 "
            "runner with ouro_vllm's worker: start without --worker-cls, with VLLM_USE_V2_MODEL_RUNNER unset or 0."
        )
