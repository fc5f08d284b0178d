"""Which servers can self-speculate or share KV: checked before anything is loaded."""

from typing import TYPE_CHECKING

from ouro_vllm.names import PLUGIN, SPECULATIVE_CONFIG, SPECULATOR
from ouro_vllm.options import OuroOptions
from ouro_vllm.sharing import AVERAGE
from ouro_vllm.wavefront.waves import must_fit

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MOST_PASSES = 128  # vLLM's rejection sampler takes no more drafts per step (MAX_SPEC_LEN)


def check(vllm_config: "VllmConfig", known_platform: bool) -> None:
    """Raises ValueError, naming setting and mend, where `--speculative-config` cannot work for an Ouro model."""
    speculative = vllm_config.speculative_config
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
    if speculative.num_speculative_tokens_per_batch_size is not None:
        raise ValueError(
            "--speculative-config: num_speculative_tokens_per_batch_size is not for Ouro, where how eagerly to draft "
            "follows from what passes cost. Leave it out; num_speculative_tokens alone is the passes per engine step."
        )
    check_passes(vllm_config, known_platform, "self-speculation", "--speculative-config")


def make_room(vllm_config: "VllmConfig") -> None:
    """Let passes hold more rows than a step schedules tokens: those that must fit, and R more per request that draft.

    `max_num_batched_tokens` is what the compiled model takes (vllm/compilation/piecewise_backend.py) and what vLLM sets
    memory aside for; what is scheduled stays what it was.
    """
    scheduler, loops = vllm_config.scheduler_config, OuroOptions.of(vllm_config).max_loops
    scheduled = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    scheduler.max_num_scheduled_tokens = scheduled
    most = must_fit(scheduled, loops, scheduler.max_num_seqs) + loops * scheduler.max_num_seqs
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, most)


def check_passes(vllm_config: "VllmConfig", known_platform: bool, what: str, setting: str) -> None:
    """Raises ValueError, naming setting and mend, where passes of rows of mixed depth cannot work.

    what: wants them. setting: how to do without it.
    """
    from vllm import envs  # the benchmark reads this module's figures without vLLM

    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if not known_platform or parallel.worker_cls != "auto":
        raise ValueError(
            f"{setting}: {what} lives in Ouro's own worker for CPUs and for CUDA and ROCm devices; this server has "
            f"another platform or --worker-cls {parallel.worker_cls!r}. Start without it."
        )
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            f"{setting}: {what} lives in vLLM's model runner V1, and this server takes V2. Start with "
            "VLLM_USE_V2_MODEL_RUNNER=0, or without it."
        )
    for given, flag, why in (
        (vllm_config.lora_config, "--enable-lora", "rows that run ahead are in no adapter's mapping"),
        (vllm_config.model_config.enable_prompt_embeds, "--enable-prompt-embeds", "rows are fed as tokens"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size", "rows keep whole contexts"),
    ):
        if given:
            raise ValueError(f"{flag}: not with {what}, where {why}. Start without one of the two.")
    kept, shuffled = vllm_config.cache_config.cache_dtype, envs.VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT
    if kept.endswith("per_token_head") or (kept.startswith("fp8") and shuffled):
        # vllm/v1/attention/backends/triton_attn.py, `_ensure_scale_caches`; rocm_aiter_fa.py, its metadata builder.
        raise ValueError(
            f"--kv-cache-dtype {kept}{', VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT' * shuffled}: the attention backend keeps "
            f"scales beside each layer's cache, and {what} reads the caches of all loops through one layer. Start "
            "without one of the two."
        )
    if scheduler.scheduler_cls is not None:
        raise ValueError(f"--scheduler-cls: {what} brings its own scheduler. Start without the flag.")


def check_sharing(vllm_config: "VllmConfig", known_platform: bool, options: OuroOptions) -> None:
    """Raises ValueError, naming setting and mend, where `kv_sharing` cannot work. Chooses scheduling that can."""
    setting = f"--additional-config: `{PLUGIN}.kv_sharing`"
    check_passes(vllm_config, known_platform, "KV sharing", setting)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "--disable-hybrid-kv-cache-manager: KV sharing keeps one KV group per loop step, which needs the hybrid "
            "manager. Start without the flag."
        )
    if options.kv_sharing == AVERAGE and vllm_config.cache_config.cache_dtype.startswith("fp8"):
        raise ValueError(
            f"{setting}: a mean of quantised keys and values loses what little precision they have. Start without "
            f'--kv-cache-dtype {vllm_config.cache_config.cache_dtype}, or with "last".'
        )
    # Rows are fed as tokens, which have to be known when a step starts.
    vllm_config.scheduler_config.async_scheduling = False
