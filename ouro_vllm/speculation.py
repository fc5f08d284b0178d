"""Which servers can self-speculate: checked before anything is loaded."""

from typing import TYPE_CHECKING

from ouro_vllm.names import SPECULATIVE_CONFIG, SPECULATOR
from ouro_vllm.options import OuroOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MOST_PASSES = 128  # vLLM's rejection sampler takes no more drafts per step (MAX_SPEC_LEN)


def check(vllm_config: "VllmConfig", known_platform: bool) -> None:
    """Raises ValueError, naming setting and mend, where `--speculative-config` cannot work for an Ouro model."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    loops = OuroOptions.of(vllm_config).max_loops
    if speculative.method != "custom_class" or speculative.model != SPECULATOR:
        raise ValueError(
            f"--speculative-config: an Ouro model drafts with its own early loops. Got method {speculative.method!r}, "
            f"model {speculative.model!r}; it must be {SPECULATIVE_CONFIG}, with the passes per step of your choice."
        )
    if loops == 1:
        raise ValueError(
            "--speculative-config: a model that runs one loop has no early loops to draft with. Start without "
            "--speculative-config, or raise max_loops in --additional-config."
        )
    passes = speculative.num_speculative_tokens
    if not passes or not 1 <= passes <= MOST_PASSES:
        raise ValueError(
            f"--speculative-config: num_speculative_tokens is the number of passes per engine step, from 1 to "
            f"{MOST_PASSES}; got {passes}."
        )
    if not known_platform or parallel.worker_cls != "auto":
        raise ValueError(
            "--speculative-config: self-speculation lives in Ouro's own worker for CPUs and for CUDA and ROCm devices; "
            f"this server has another platform or --worker-cls {parallel.worker_cls!r}. Start without it."
        )
    for given, flag, why in (
        (vllm_config.lora_config, "--enable-lora", "rows that run ahead are in no adapter's mapping"),
        (vllm_config.model_config.enable_prompt_embeds, "--enable-prompt-embeds", "rows are fed as tokens"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size", "rows keep whole contexts"),
    ):
        if given:
            raise ValueError(f"{flag}: not with self-speculation, where {why}. Start without one of the two.")
    if vllm_config.scheduler_config.scheduler_cls is not None:
        raise ValueError("--scheduler-cls: self-speculation brings its own scheduler. Start without the flag.")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "--disable-hybrid-kv-cache-manager: self-speculation keeps one KV group per loop step, which needs the "
            "hybrid manager. Start without the flag."
        )
