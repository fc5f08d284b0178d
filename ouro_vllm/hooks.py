"""How vLLM learns of Ouro: registrations, and the check of a server's setup before anything is loaded.

Extension points: `ModelRegistry`, `MODELS_CONFIG_MAP`, the tokenizer and renderer registries, `AutoConfig`. What has
none is in `patches`.
"""

import os
from typing import TYPE_CHECKING

from ouro_vllm import config as ouro_config
from ouro_vllm import patches, speculation
from ouro_vllm.names import ARCHITECTURE, MODEL_TYPE, OLDEST_VLLM, TOKENIZER_MODE
from ouro_vllm.options import OuroOptions, refuse_depth

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

BREAKABLE_GRAPHS = "VLLM_USE_BREAKABLE_CUDAGRAPH"
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def install() -> None:
    """Make all registrations in this process; a second call finds them done.

    Raises:
        RuntimeError: vLLM is older than OLDEST_VLLM.
    """
    import vllm

    # First of all: an older vLLM lacks what is imported next, and would say so instead.
    refuse_old_vllm(vllm.__version__, vllm.__version_tuple__)

    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from ouro_vllm import attention

    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is OuroServerCheck:
        return
    AutoConfig.register(MODEL_TYPE, ouro_config.OuroConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "ouro_vllm.model:OuroForCausalLM")
    TokenizerRegistry.register(TOKENIZER_MODE, "ouro_vllm.tokenizer", "OuroTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
    attention.register()
    patches.validate_requests()
    patches.salt_by_depth()
    patches.carry_metrics()
    MODELS_CONFIG_MAP[ARCHITECTURE] = OuroServerCheck


def refuse_old_vllm(version: str, parts: tuple[int | str, ...]) -> None:
    """Raises RuntimeError below OLDEST_VLLM; development builds, which call themselves 0.0, are let through."""
    if (0, 0) < parts[:2] < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise RuntimeError(f"ouro-vllm needs vLLM {oldest} or newer; {version} is installed. Mend: upgrade vLLM.")


class OuroServerCheck:
    """Called by vLLM with the whole configuration of a server, before a process is started or a weight is read.

    The two methods are those of `VerifyAndUpdateConfig` (vllm/model_executor/models/config.py).
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Everything there is to say needs the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot work, choose the tokenizer, and let CUDA graphs copy their inputs.

        Raises:
            ValueError: naming the setting and the mend.
        """
        from vllm.config import CUDAGraphMode

        model_config, compilation = vllm_config.model_config, vllm_config.compilation_config
        ouro_config.check(model_config.hf_config)
        options = OuroOptions.of(vllm_config)
        refuse_unsupported(vllm_config)
        shallow = not options.depth.full(options.max_loops)
        if shallow or options.shares:
            os.environ.setdefault(V2_RUNNER, "0")  # on CUDA vLLM prefers V2 where it is not told
        choose_worker(vllm_config, options)
        if shallow:
            refuse_depth(vllm_config)
        # vLLM turns these graphs on by itself for batch invariance, but only where the variable is not set.
        os.environ.setdefault(BREAKABLE_GRAPHS, "0")
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            # The compiled pass runs R times in a step, each time on another tensor; a graph replays fixed addresses.
            compilation.cudagraph_copy_inputs = True
        if options.fix_special_tokens and model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE


def choose_worker(vllm_config: "VllmConfig", options: OuroOptions) -> None:
    """Put Ouro's worker in place, and its scheduler: one where it speculates or shares KV, one for vLLM's V1 runner
    otherwise.

    Raises:
        ValueError: self-speculation or sharing on a platform or with a setting that has no place for it.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    known = current_platform.is_cpu() or current_platform.is_cuda_alike()
    if speculative is not None:
        speculation.check(vllm_config, known)
        speculation.make_room(vllm_config)
    if options.shares:
        speculation.check_sharing(vllm_config, known, options)
    if speculative is not None or options.shares:
        vllm_config.scheduler_config.scheduler_cls = "ouro_vllm.scheduler.OuroScheduler"
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            # A pass is the unit of replay: its rows stand at any depth, which graphs of whole steps cannot express.
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif known and not vllm_config.use_v2_model_runner and vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = "ouro_vllm.tally.plain_scheduler"
    if known and parallel.worker_cls == "auto":
        parallel.worker_cls = "ouro_vllm.workers.Ouro" + ("CPU" if current_platform.is_cpu() else "GPU") + "Worker"


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Raises ValueError for setups that a looped model cannot have.

    All but the first are refused for one reason: which loop's KV cache a pass uses is decided outside the compiled
    graph (see `passes`), so whatever freezes that decision, or takes layer names for caches, would be silently wrong.
    """
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a looped model runs the same layers again "
            "and again, and a loop cannot cross pipeline stages. Use --tensor-parallel-size or --data-parallel-size."
        )
    if parallel.use_ubatching:
        raise ValueError(
            "--enable-dbo and --ubatch-size: microbatches exchange the forward context, and so do the loops of an Ouro "
            "layer. Start without them."
        )
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size:
        raise ValueError(
            "--kv-transfer-config and --kv-offloading-size: KV connectors save and load caches by layer name, and all "
            "loops of an Ouro layer run under one name. Start without a connector."
        )
    if compilation.use_inductor_graph_partition or compilation.splitting_ops:
        raise ValueError(
            "--compilation-config: `use_inductor_graph_partition` and `splitting_ops` would capture the KV cache of "
            "loop 1 for all loops. Leave both unset."
        )
    if os.environ.get(BREAKABLE_GRAPHS, "0") not in ("", "0"):
        raise ValueError(f"{BREAKABLE_GRAPHS}: such graphs would read the KV cache of loop 1 in all loops. Unset it.")
