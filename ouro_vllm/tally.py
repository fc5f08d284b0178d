"""How deep requests are computed, as the scheduler sees it: what its figures say, and which blocks may be shared.

Every request (vLLM's v1 Request) carries `request.ouro_depth`, a `Tally` of the tokens it got so far. It is up to date
once `update_from_output` here has returned, also for a request that has just finished and left `Scheduler.requests`.
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ouro_vllm.names import EXITS, PLUGIN
from ouro_vllm.options import Depth, OuroOptions, depth_of


@dataclass
class Tally:
    """Tokens of one request. tokens: how many; loops: sum of the loops that they were read after."""

    depth: Depth
    tokens: int = 0
    loops: int = 0

    @property
    def mean(self) -> float:
        """Mean depth per token, 0 before the first."""
        return self.loops / self.tokens if self.tokens else 0.0


class DepthFigures:
    """Counts depths per request and for /metrics. Mixed into a vLLM scheduler, which it finds behind itself."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.ouro = OuroOptions.of(vllm_config)
        self.read = [0] * self.ouro.max_loops  # tokens by the loop they were read after
        self.reported = list(self.read)

    def add_request(self, request: Any) -> None:
        """As vLLM does, with a tally on the request (vLLM's v1 Request)."""
        request.ouro_depth = Tally(depth_of(request.sampling_params, self.ouro))
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM does, then counts, and sends the counts along (see `patches.carry_metrics`).

        Only the runner knows where the gate let a token go; what it does not name left at the request's deepest loop.
        """
        seen = {name: self.requests[name] for name in scheduler_output.num_scheduled_tokens if name in self.requests}
        exits = {request: list(map(int, loops)) for request, loops in getattr(model_runner_output, EXITS, {}).items()}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                count = len(output.new_token_ids)
                if not count or output.request_id not in seen:
                    continue
                tally = seen[output.request_id].ouro_depth
                tally.tokens += count
                loops = exits.get(output.request_id, ())[:count]
                if not loops:
                    tally.loops += count * tally.depth.loops
                    self.read[tally.depth.loops - 1] += count
                for loop in loops:
                    tally.loops += loop
                    self.read[loop - 1] += 1
        for client in outputs.values():
            if client.scheduler_stats is not None and self.read != self.reported:
                carried = client.scheduler_stats.kv_connector_stats or {}
                ours = {
                    **carried.get(PLUGIN, {}),
                    "exits": [new - old for new, old in zip(self.read, self.reported, strict=True)],
                }
                client.scheduler_stats.kv_connector_stats = {**carried, PLUGIN: ours}
                self.reported = list(self.read)
                break
        return outputs


def plain_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's own scheduler, sync or async as it would choose, that counts depths. For servers without speculation."""
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type(f"Ouro{base.__name__}", (DepthFigures, base), {})(vllm_config, *args, **kwargs)
