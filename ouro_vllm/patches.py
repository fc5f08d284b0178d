"""The patches of vLLM: all there are, each with its reason and the versions it was checked against.

A patched function that vLLM no longer has is found when the plugin is loaded or the worker made, not at a request.
"""

import functools
from typing import Any

from ouro_vllm.names import ARCHITECTURE, PLUGIN


def validate_requests() -> None:
    """`InputProcessor._validate_params` also checks `ouro_*` in `extra_args`, against what the server runs.

    Reason: vLLM hands `vllm_xargs` on unread, so that a wrong value would first be seen in a worker, where it can only
    end the engine. Here it is an HTTP 400 for the one request. Checked: vLLM 0.32, 0.33.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from ouro_vllm.options import OptionError, OuroOptions, RequestOptions, refuse_depth

    original = InputProcessor._validate_params
    if hasattr(original, PLUGIN):
        return

    @functools.wraps(original)
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if ARCHITECTURE in self.model_config.architectures:
            server = OuroOptions.of(self.vllm_config)
            try:
                asked = RequestOptions.parse(getattr(params, "extra_args", None))
                asked.check_draft(self.model_config.get_vocab_size(), self.model_config.max_model_len)
                if not asked.depth(server).full(server.max_loops):
                    refuse_depth(self.vllm_config)
            except OptionError as error:
                raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        return original(self, params, *args, **kwargs)

    setattr(validate, PLUGIN, True)
    InputProcessor._validate_params = validate


def salt_by_depth() -> None:
    """`InputProcessor.process_inputs` gives requests of different depth different cache salts.

    Reason: vLLM finds prefix-cache blocks by tokens, and a block holds the loops that its request ran. The salt is
    part of the first block's hash, which all later ones include; the one hook, the field of the prompt, is the user's.
    And prompts that come piece by piece, whose answers become prompt, are refused where prompts and answers differ in
    what is kept of them. Checked: vLLM 0.32, 0.33.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from ouro_vllm.options import OuroOptions, depth_of, salt

    original = InputProcessor.process_inputs
    if hasattr(original, PLUGIN):
        return

    @functools.wraps(original)
    def process(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if ARCHITECTURE in self.model_config.architectures:
            server = OuroOptions.of(self.vllm_config)
            depth = depth_of(request.sampling_params, server)
            if request.resumable and (server.shares or (depth.gated and self.vllm_config.speculative_config)):
                raise VLLMValidationError(
                    "A prompt that comes piece by piece is not possible with kv_sharing, or with an exit threshold "
                    "under self-speculation: send it whole."
                )
            request.cache_salt = salt(request.cache_salt, depth, server)
        return request

    setattr(process, PLUGIN, True)
    InputProcessor.process_inputs = process


def carry_metrics() -> None:
    """`StatLoggerManager.record` hands our part of the scheduler's figures to our metrics.

    Reason: no field for a plugin's figures reaches the process that serves /metrics. They travel as an entry of
    `SchedulerStats.kv_connector_stats`, the one free dictionary on that way (KV connectors are refused for Ouro, so it
    is empty otherwise), and are taken out before vLLM's own loggers look at it. Checked: vLLM 0.32, 0.33.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    original = StatLoggerManager.record
    if hasattr(original, PLUGIN):
        return

    @functools.wraps(original)
    def record(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> Any:
        carried = getattr(scheduler_stats, "kv_connector_stats", None)
        if carried and PLUGIN in carried:
            from ouro_vllm.metrics import exported

            exported().observe(carried.pop(PLUGIN), kwargs.get("engine_idx") or 0)
            scheduler_stats.kv_connector_stats = carried or None
        return original(self, scheduler_stats, *args, **kwargs)

    setattr(record, PLUGIN, True)
    StatLoggerManager.record = record


def look_out_in_bursts() -> None:
    """`EngineCore.post_step` asks for drafts once for each piece of a burst, until a request or an abort has come, and
    not at all behind plain steps.

    Reason: vLLM takes in requests between steps only and asks for drafts once, so that who comes in the middle of a
    burst would wait for all of it. Only the engine core knows of both, and it decides for all ranks. An engine without
    a process of its own (`LLM` with VLLM_ENABLE_V1_MULTIPROCESSING=0) has no queue: nobody can come in mid-step.
    Checked: vLLM 0.32, 0.33.
    """
    from vllm.v1.engine.core import EngineCore

    original = EngineCore.post_step
    if hasattr(original, PLUGIN):
        return

    @functools.wraps(original)
    def post_step(self: Any, model_executed: bool) -> None:
        asks, coming = getattr(self.scheduler, "next_piece", None), getattr(self, "input_queue", None)
        if asks is None or asks():
            original(self, model_executed)
        while asks is not None and (coming is None or coming.empty()) and asks():
            original(self, model_executed)

    setattr(post_step, PLUGIN, True)
    EngineCore.post_step = post_step


def expand_on_cpu() -> None:
    """`rejection_sampler.expand_batch_to_tokens` does on the CPU what its docstring says.

    Reason: its CPU kernel is given int64 copies of temperatures, top-k and top-p and of the result, which is never
    copied back (vllm/utils/cpu_triton_utils.py, `_expand_kernel_impl`): sampled requests under any speculation are
    judged with whatever is in memory. Greedy requests are not concerned. Checked: vLLM 0.32, 0.33.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.expand_batch_to_tokens
    if hasattr(original, PLUGIN):
        return

    @functools.wraps(original)
    def expand(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)

    setattr(expand, PLUGIN, True)
    rejection_sampler.expand_batch_to_tokens = expand
