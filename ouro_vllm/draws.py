"""Draws keyed by (seed, position), with and without speculation.

A seed then repeats itself, alone or in a batch, whatever was drafted.
Overridden, all of vllm/v1/worker/gpu_model_runner.py (0.32):
    _update_states: notes which requests are new.
    _on_request_state_removed: vLLM's hook for this.
    _prepare_inputs: of steps without drafts takes the way of servers without speculation.
    _sample: sets each request's generator to the position drawn for.
"""

from typing import Any

import torch

from ouro_vllm.noise import key
from ouro_vllm.options import Depth, OuroOptions, depth_of


class KeyedDraws:
    """Mixed into a V1 model runner. Remembers the seed and the depth of each request."""

    def start_draws(self) -> None:
        """Called once, after the runner is made."""
        self._seeds: dict[str, int] = {}
        self._options = OuroOptions.of(self.vllm_config)
        self._depths: dict[str, Depth] = {}
        self._unseeded = torch.Generator().manual_seed(self.model_config.seed)

    def _update_states(self, scheduler_output: Any) -> Any:
        result = super()._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            self._depths[new.req_id] = depth_of(params, self._options)
            if new.req_id not in self._seeds and params is not None:
                # Every rank sees requests in the same order, so an unseeded one has the same seed on all of them.
                drawn = int(torch.randint(0, 2**62, (), generator=self._unseeded)) if params.seed is None else None
                self._seeds[new.req_id] = params.seed if drawn is None else drawn
        # vLLM rewinds the generators of requests that are still in their prompts, which CPU generators cannot do.
        self.input_batch.generators.clear()
        return result

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._seeds.pop(req_id, None)
        self._depths.pop(req_id, None)

    def _prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; of steps with nothing to verify as it does without speculation.

        That is less work, and its rejection sampler's top-k fails on no drafts at all.
        """
        config = self.speculative_config
        if not scheduler_output.scheduled_spec_decode_tokens:
            self.speculative_config = None
        try:
            return super()._prepare_inputs(scheduler_output, *args, **kwargs)
        finally:
            self.speculative_config = config

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        batch = self.input_batch
        if batch.random_reqs:
            ends = self.optimistic_seq_lens_cpu[: batch.num_reqs].tolist()
            for index, request in enumerate(batch.req_ids):
                if request in batch.random_reqs:
                    # RejectionSampler.forward draws the last token of the step first: its position is the key's. Then
                    # what accepts drafts, and what takes the place of a rejected one. Those draws have no key of their
                    # own, but drafts were drawn with their positions' keys from the same probabilities: they are kept.
                    batch.generators[index] = self.generator(request, ends[index])
        try:
            return super()._sample(logits, spec_decode_metadata)
        finally:
            batch.generators.clear()

    def generator(self, request: str, position: int) -> torch.Generator:
        """The generator for the token at `position` (0-based) of a request."""
        return torch.Generator(device=self.device).manual_seed(key(self._seeds[request], position))
