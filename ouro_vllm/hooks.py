"""How vLLM learns of Ouro: registrations, and the check of a server's setup before anything is loaded.

Only extension points: `ModelRegistry`, `MODELS_CONFIG_MAP`, the tokenizer and renderer registries, `AutoConfig`.
"""

from typing import TYPE_CHECKING

from ouro_vllm import config as ouro_config
from ouro_vllm.names import ARCHITECTURE, MODEL_TYPE, OLDEST_VLLM, TOKENIZER_MODE
from ouro_vllm.options import OuroOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install() -> None:
    """Make all registrations in this process; a second call finds them done.

    Raises:
        RuntimeError: vLLM is older than OLDEST_VLLM.
    """
    import vllm
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    refuse_old_vllm(vllm.__version__, vllm.__version_tuple__)
    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is OuroServerCheck:
        return
    AutoConfig.register(MODEL_TYPE, ouro_config.OuroConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "ouro_vllm.model:OuroForCausalLM")
    TokenizerRegistry.register(TOKENIZER_MODE, "ouro_vllm.tokenizer", "OuroTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = OuroServerCheck


def refuse_old_vllm(version: str, parts: tuple[int | str, ...]) -> None:
    """Raises RuntimeError below OLDEST_VLLM; development builds, which call themselves 0.0, are let through."""
    if (0, 0) < parts[:2] < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise RuntimeError(f"ouro-vllm needs vLLM {oldest} or newer; {version} is installed. Mend: upgrade vLLM.")


class OuroServerCheck:
    """Called by vLLM with the whole configuration of a server, before a process is started or a weight is read.

    The two methods are those of `VerifyAndUpdateConfig` (vllm/model_executor/models/config.py); not derived from it,
    so that importing this module stays cheap.
    """

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        """Everything there is to say needs the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot work, choose the tokenizer, and let CUDA graphs copy their inputs.

        Raises:
            ValueError: naming the setting and the mend.
        """
        model_config = vllm_config.model_config
        ouro_config.check(model_config.hf_config)
        options = OuroOptions.parse(vllm_config.additional_config, model_config.hf_config.total_ut_steps)
        refuse_unsupported(vllm_config)
        # The compiled pass runs R times in a step, each time on another tensor; a graph replays fixed addresses.
        vllm_config.compilation_config.cudagraph_copy_inputs = True
        if options.fix_special_tokens and model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = TOKENIZER_MODE


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Raises ValueError for setups that a looped model cannot have."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a looped model runs the same layers again "
            "and again, and a loop cannot cross pipeline stages. Use --tensor-parallel-size or --data-parallel-size."
        )
    if parallel.enable_dbo:
        raise ValueError("--enable-dbo: Ouro runs its loops in one batch. Start without it.")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            "--kv-transfer-config: KV connectors save and load caches by layer name, and all loops of an Ouro layer "
            "run under one name. Start without a connector."
        )
