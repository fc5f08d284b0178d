"""The scheduler under self-speculation and KV sharing.

Self-speculation: slots for rows that run ahead, and one place where the pace is decided. Sharing: what the managers of
loops have to know of requests.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from time import monotonic, perf_counter
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler

from ouro_vllm.anytime.frames import FRAMES
from ouro_vllm.kv import LoopManager, decoding_capacity
from ouro_vllm.metrics import carried, summary
from ouro_vllm.names import PLUGIN
from ouro_vllm.options import OuroOptions, judged_apart, leads, speculates
from ouro_vllm.patches import look_out_in_bursts
from ouro_vllm.tally import DepthFigures
from ouro_vllm.wavefront.pacing import Batch, Pace, Pacer, StepReport
from ouro_vllm.wavefront.waves import Counts

logger = init_logger(f"vllm.{PLUGIN}.scheduler")

LOG_SECONDS = 10.0  # vLLM's own interval between lines of statistics


class OuroScheduler(DepthFigures, Scheduler):
    """vLLM's scheduler. Overridden: `__init__`, `add_request`, `schedule`, `update_draft_token_ids`,
    `update_from_output`, `make_stats`.

    clock: seconds, for the pace; whoever steps the engine with breaks between gives one that stands still in them.
    """

    clock = staticmethod(perf_counter)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        options = self.ouro
        if self.num_spec_tokens:
            look_out_in_bursts()
            # Rows run ahead of what is scheduled by the passes of a burst and by what is in flight behind them.
            self.num_lookahead_tokens = self.num_spec_tokens + options.max_loops - 1
            # vLLM pads a request that needs one token to 1 + k rows of token -1, for CUDA graphs of uniform steps.
            # There are none here, and the padding would be drafts without rows. A schedule of drafts per batch size
            # turns it off.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        if options.shares:
            self._share(options)
        self.pacer = Pacer(
            options.max_loops, self.num_spec_tokens, options.entry_loop, contested=options.speculation == "wavefront"
        )
        self.pieces = 0  # of the burst behind the latest step, that may still run
        self.drafted = False  # whether the latest of them had anything to do, or none has run
        self.steps = 0
        self.past = StepReport(Counts(), 0)  # of all steps up to the latest line in the log
        self.unlogged, self.logged = StepReport(Counts(), 0), monotonic()
        self.latest: StepReport | None = None
        self.steady: tuple[Any, Batch] | None = None  # see `_batch`
        self.undrafted: set[str] = set()  # requests beside which no drafts may be verified
        self.vain: int | None = None  # requests that ran when drafts were dropped for a prompt that did not come

    def _share(self, options: OuroOptions) -> None:
        """Tell the managers of the loops what they need, and the log what sharing is worth."""
        ahead = self.num_spec_tokens + self.num_lookahead_tokens
        managers = self.kv_cache_manager.coordinator.single_type_managers
        windowed = [manager for manager in managers if isinstance(manager, LoopManager)]
        for manager in windowed:
            manager.requests = self.requests
            manager.most_tokens = self.max_num_scheduled_tokens + ahead
        blocks, size = self.kv_cache_config.num_blocks - 1, managers[0].block_size  # one block is nobody's
        tokens = decoding_capacity(blocks, size, self.max_model_len, options.kv_window, ahead, len(windowed))
        logger.info(
            "KV sharing %r, window %d: %s tokens of decoding fit, in requests of up to %s tokens with short prompts; "
            "vLLM's own line reckons with prompts that long, which keep the keys and values of every loop until they "
            "are done.",
            options.kv_sharing,
            options.kv_window,
            f"{tokens:,}",
            f"{self.max_model_len:,}",
        )

    def add_request(self, request: Any) -> None:
        """As vLLM does. Under sharing only the prompt is looked up in the prefix cache, now and after preemption.

        What another request wrote for the same tokens as its prompt is not what this one reads behind its own.
        """
        if self.ouro.shares:
            request._block_hasher = None  # the prompt's hashes are there already
        if self.num_spec_tokens and judged_apart(request.sampling_params):
            self.undrafted.add(request.request_id)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, with the pace attached."""
        began = self.clock()
        undrafted = bool(self.undrafted) and self._undrafted_near()
        bare = bool(self.num_spec_tokens) and self._bare()
        if undrafted or bare:  # drafts stay under way, as rows, and are proposed again behind this step
            for request in self.running:
                request.spec_token_ids = []
        output = super().schedule(*args, **kwargs)
        if self.num_spec_tokens:
            batch = self._batch(output)
            batch = batch._replace(alone=True) if undrafted else batch
            if bare or batch.prompts:
                self.vain = None if batch.prompts else len(self.running)
            pace = self._paced(self.pacer.begin, began, batch) or Pace(self.pacer.loops, 0)
            if pace.plain and output.scheduled_spec_decode_tokens:  # they are verified before steps are plain
                pace = replace(pace, plain=False)
            if self.waiting and not pace.plain:
                pace = replace(pace, awaited=True)
            setattr(output, PLUGIN, pace)
            self.pieces = 0 if pace.plain else pace.pieces if self.ouro.speculation == "wavefront" else 1
            self.drafted = True
        return output

    def update_draft_token_ids(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, which calls it behind each piece of a burst that had anything to do."""
        super().update_draft_token_ids(*args, **kwargs)
        self.pieces, self.drafted = self.pieces - 1, True

    def next_piece(self) -> bool:
        """Whether the runner is to be asked for drafts, once more. See `patches.look_out_in_bursts`."""
        drafted, self.drafted = self.drafted, False
        return drafted and self.pieces > 0

    def _undrafted_near(self) -> bool:
        """Whether this step may have a request of `undrafted` in it."""
        self.undrafted &= self.requests.keys()
        here = any(request.request_id in self.undrafted for request in self.running)
        return here or (bool(self.undrafted) and len(self.running) < self.max_num_running_reqs)

    def _bare(self) -> bool:
        """Whether prompts may come into this step beside which no drafts are to be verified."""
        running = len(self.running)
        places = self.max_num_running_reqs - running
        coming = list(islice(self.waiting, places)) if self.vain is None or running < self.vain else []
        if not coming and self.steady is not None:  # all that run are past their prompts
            return False
        requests = [*self.running, *coming]
        left = [request.num_tokens - request.num_computed_tokens - 1 for request in requests]
        prompts = min(sum(left), self.max_num_scheduled_tokens)
        batch = Batch(len(left), prompts=prompts, fresh=sum(tokens > 0 for tokens in left))
        if not self._paced(self.pacer.bare, batch):
            return False
        return not any(leads(request.sampling_params, request.ouro_depth.depth) for request in requests)

    def _paced(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the pacer answers; None where it fails, which is to cost speed alone."""
        try:
            return call(*args)
        except Exception:
            logger.exception("Self-speculation failed to choose a pace.")
            return None

    def _batch(self, output: Any) -> Batch:
        """What the pace is to know of a step."""
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        if self.steady is not None and output.total_num_scheduled_tokens == len(scheduled):
            # One token each, of those who were past their prompts a step ago: nobody has to be looked at.
            requests, batch = self.steady
            if requests == scheduled.keys():
                return batch
        decoding, hurry, led, drawn, prompts, fresh, alone = 0, False, False, 0, 0, 0, True
        for request_id, tokens in scheduled.items():
            request = self.requests[request_id]
            drawn += request.sampling_params.temperature > 0
            led = led or leads(request.sampling_params, request.ouro_depth.depth)
            drafted_for = speculates(request.sampling_params)
            alone = alone and not drafted_for
            prompt = tokens - 1 - len(drafts.get(request_id, ()))
            prompts += prompt
            if request.num_computed_tokens < request.num_tokens:  # more of the prompt to come
                hurry = True
            else:
                decoding += 1
                fresh += prompt > 0 or not request.num_output_tokens
                hurry = hurry or not drafted_for
        batch = Batch(decoding, hurry, led, 2 * drawn > len(scheduled), prompts, fresh, alone)
        same = decoding == len(scheduled)
        self.steady = (scheduled.keys(), batch._replace(prompts=0, fresh=0)) if same else None
        return batch

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM does, after learning from what the runner measured; frames go along with their requests' tokens."""
        report = getattr(model_runner_output, PLUGIN, None)
        if report is not None:
            self._paced(self.pacer.learn, report)
            self.steps += 1
            self.unlogged.add(report)
            self.latest = report
            self._log()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if report is not None:
            self._paced(self.pacer.end, report.committed, report.plain, bool(self.running))
        frames = getattr(model_runner_output, FRAMES, None)
        if frames:
            for of_client in outputs.values():
                for output in of_client.outputs:
                    if output.request_id in frames:
                        output.kv_transfer_params = {PLUGIN: frames[output.request_id]}
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, with this step's figures on board (see `patches.carry_metrics`)."""
        stats = super().make_stats(*args, **kwargs)
        report = self.latest
        if stats is not None and report is not None:
            in_flight = report.in_flight if self.running else 0
            step = carried(report.counts, report.committed, in_flight, self.pacer.entry, report.plain)
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), PLUGIN: step}
            # Until nothing is in flight any more: the last to go may do so between steps.
            self.latest = StepReport(Counts(), 0, in_flight, report.plain) if in_flight else None
        return stats

    @property
    def totals(self) -> StepReport:
        """Sums of all steps."""
        sums = StepReport(Counts(), 0)
        for some in (self.past, self.unlogged):
            sums.add(some)
        return sums

    def _log(self) -> None:
        now = monotonic()
        if now - self.logged >= LOG_SECONDS and self.unlogged.committed:
            if self.log_stats:
                logger.info(summary(self.unlogged.counts, self.unlogged.committed, self.pacer.entry, self.pacer.plain))
            self.past.add(self.unlogged)
            self.unlogged, self.logged = StepReport(Counts(), 0), now
