"""Plain decoding, at other than full depth too: requests of any depth share a batch and run its loops in lockstep.

Rows that are shallower than the deepest of the batch ride along; each is read after its own loop. A batch of one fixed
depth d costs d passes, one with a gate in it as many as its deepest loop: all loops write keys and values.
Overridden, all of vllm/v1/worker/gpu_model_runner.py (0.32): execute_model, _model_forward, sample_tokens.
"""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context

from ouro_vllm.draws import KeyedDraws
from ouro_vllm.exits import ExitPick
from ouro_vllm.names import EXITS


class PlainDepths(KeyedDraws):
    """Mixed into a V1 model runner. Self-speculation adds to it, and uses it for steps in which nothing runs ahead."""

    def start_plain(self) -> None:
        """Called once, after the runner is made and before the model is loaded."""
        self.start_draws()
        self._scheduled: Any = None
        self._read: tuple[list[str], torch.Tensor] | None = None

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; without it `_model_forward` would take its warming up for a step."""
        self._scheduled = scheduler_output
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._scheduled = None

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        requests = [] if self._scheduled is None else list(self.input_batch.req_ids)
        depths = [self._depths[request] for request in requests]
        if all(depth.full(self._options.max_loops) for depth in depths):
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs)

        model, deepest = self.get_model(), max(depth.loops for depth in depths)
        hidden = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        counts = [self._scheduled.num_scheduled_tokens[request] for request in requests]
        mixed = any(depth.gated or depth.loops != deepest for depth in depths)
        pick = ExitPick(depths, counts, hidden, model.exit_logits) if mixed else None
        with _by_pass(self.cudagraph_dispatcher):
            for loop in range(1, deepest + 1):
                hidden = model.one_pass(positions, hidden, loop)
                if pick is not None:
                    pick.take(loop, hidden)
        if pick is None:
            return hidden
        ends = list(accumulate(counts))
        gated = [(request, end - 1) for request, end, depth in zip(requests, ends, depths, strict=True) if depth.gated]
        if gated:
            # On its way while the sampler works; vLLM waits for what was copied up to then before it hands outputs on.
            rows = pick.loop[[row for _, row in gated]]
            self._read = [request for request, _ in gated], rows.to("cpu", non_blocking=True)
        return pick.hidden

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM does; where the gate let rows go is sent along."""
        output, read = super().sample_tokens(grammar_output), self._read
        self._read = None
        if read is not None and output is not None:
            # Under async scheduling the output is wrapped until its tokens have arrived, and these loops with them.
            inner = getattr(output, "_model_runner_output", output)
            setattr(inner, EXITS, dict(zip(read[0], read[1].numpy()[:, None], strict=True)))
        return output


def _by_pass(dispatcher: Any) -> Any:
    """A forward context in which single passes run: graphs of whole forwards have all loops in them, of passes one."""
    context = get_forward_context()
    if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
        return override_forward_context(context)
    batch = replace(context.batch_descriptor, num_reqs=None, uniform=False)
    known = batch in dispatcher.cudagraph_keys[CUDAGraphMode.PIECEWISE]
    mode = CUDAGraphMode.PIECEWISE if known else CUDAGraphMode.NONE
    return override_forward_context(replace(context, cudagraph_runtime_mode=mode, batch_descriptor=batch))
