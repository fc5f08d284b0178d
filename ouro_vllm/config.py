"""The Ouro model configuration: what `config.json` says, and what of it can be served.

Knows transformers, not vLLM. Field names are those of the published checkpoints.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ouro_vllm.names import MODEL_TYPE


@strict
class OuroConfig(PreTrainedConfig):
    """`model_type: ouro`. Rotary settings may come as `rope_theta` and `rope_scaling` or as `rope_parameters`.

    Raises:
        StrictDataclassFieldValidationError: a field of a wrong type; the message names it.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    attention_dropout: int | float = 0.0
    # None stands for "not in config.json": a looped model without a loop count is refused, not guessed at.
    total_ut_steps: int | None = None
    early_exit_threshold: int | float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim, rest = divmod(self.hidden_size, max(1, self.num_attention_heads))
            if rest:
                raise ValueError(
                    f"config.json: `hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                    f"({self.num_attention_heads}) where `head_dim` is not given."
                )
        super().__post_init__(**kwargs)


def check(config: OuroConfig) -> None:
    """Refuse a configuration that no looped model can have, or that this plugin does not run.

    Raises:
        ValueError: naming the field of `config.json`, its value and what is allowed.
    """
    loops = config.total_ut_steps
    if loops is None:
        raise ValueError(
            "config.json has no `total_ut_steps`: the number of loops the model was trained with. "
            "Add it (4 in the published Ouro checkpoints)."
        )
    if loops < 1:
        raise ValueError(f"config.json: `total_ut_steps` is {loops}; it must be at least 1.")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"config.json: `{name}` is {getattr(config, name)}; it must be at least 1.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.json: `num_attention_heads` ({config.num_attention_heads}) must be a multiple of "
            f"`num_key_value_heads` ({config.num_key_value_heads})."
        )
    if config.hidden_act != "silu":
        raise ValueError(f"config.json: `hidden_act` is {config.hidden_act!r}; only 'silu' is supported.")
    strange = set(config.layer_types or ()) - {"full_attention"}
    if strange:
        raise ValueError(
            f"config.json: `layer_types` names {', '.join(map(repr, sorted(strange)))}; "
            "only 'full_attention' is supported."
        )
