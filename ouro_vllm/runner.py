"""Ouro's model runner where rows of any loop share a pass (self-speculation, KV sharing): vLLM's V1 runner with the
wavefront.

A step runs in one of four ways, by whether anything runs ahead in it (`_nothing_ahead`) and whether loops share KV:
    nothing ahead, no sharing: vLLM's forward, metadata and slots; nothing of ours but what `plain` does.
    nothing ahead, sharing, one stage: vLLM's forward, all loops in turn, on our metadata (`_lockstep`, `_with_shared`).
    nothing ahead, sharing, several stages (`_stages`): passes of chunks, in `_wave_forward`.
    something ahead: passes of rows of any depth and of chunks, in `_wave_forward`; the last, if there are several.

What is overridden beside `draws` and `plain`, all of vllm/v1/worker/gpu_model_runner.py (0.32):
    initialize_kv_cache, shutdown: makes the machine for the passes, and lets go of the KV cache.
    _update_states: notes which requests are new, lost their blocks, or are gone.
    execute_model, _get_slot_mappings, _build_attention_metadata: metadata is built in `wavefront.tensors`, per pass or,
        of bare steps (`_nothing_ahead`), for all loops ahead; but of bare steps vLLM's way, if loops share no KV.
    _model_forward: vLLM's hook for this.
    sample_tokens: what was measured goes along with the output.
    _get_spec_decode_draft_probs, _input_fits_in_drafter, propose_draft_token_ids, take_draft_token_ids: drafting.
The burst of passes that drafts runs in `take_draft_token_ids`, which the engine core calls after the step's tokens are
on their way to the reader (`EngineCore.post_step`), not in `propose_draft_token_ids`, before. It calls once for each
piece of the burst, as long as nobody comes who would have to wait (`patches.look_out_in_bursts`).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context, set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.block_table import SlotMappingMode

from ouro_vllm.anytime.frames import FRAMES, Frame, Watch
from ouro_vllm.attention import at_other_blocks, is_own
from ouro_vllm.exits import ExitPick, chance
from ouro_vllm.kv import Pool
from ouro_vllm.names import EXITS, PLUGIN
from ouro_vllm.options import leads, speculates
from ouro_vllm.plain import PlainDepths
from ouro_vllm.sharing import AVERAGE, Sharing
from ouro_vllm.sizes import compiled, rounded
from ouro_vllm.wavefront.flight import Flight, Row
from ouro_vllm.wavefront.lookup import Lookup
from ouro_vllm.wavefront.pacing import MOST_TIMED, Pace, StepReport, bucket
from ouro_vllm.wavefront.tensors import Passes, Step
from ouro_vllm.wavefront.waves import Chunk, Lane, Waves, slots_needed

logger = init_logger(f"vllm.{PLUGIN}.runner")

TIMED = 4  # passes per size, the first of which does not count
MOST_READ = 256  # rows whose logits are there at one time
MOST_COMPILED = 128  # rows in the largest pass that is compiled at the start, where sizes are


class LoopPasses(PlainDepths):
    """The wavefront. Mixed into a V1 model runner of a server with `SelfSpeculator`, or one that shares KV."""

    def start_passes(self) -> None:
        """Called once, after the runner is made and before the model is loaded."""
        self.start_plain()
        options, speculative = self._options, self.vllm_config.speculative_config
        self._loops = options.max_loops
        self._burst = 0 if speculative is None else speculative.num_speculative_tokens
        self._sharing: Sharing | None = None
        self._textbook = options.speculation == "draft-verify"
        self._waves: Waves | None = None
        self._pool: Pool | None = None
        self._layers: dict[str, Any] = {}
        self._pace = Pace(entry=1, passes=self._burst)
        self._lanes: list[Lane] = []
        self._own_step = self._bare = False  # of a step: its metadata is ours to build; nothing runs ahead in it
        self._ahead: int | None = None  # passes of the burst that are still to run, None if no drafts are due
        self._lookups: dict[str, Lookup] = {}
        self._watches: dict[str, Watch] = {}
        self._led: set[str] = set()  # requests of which something is always to run ahead, see `_nothing_ahead`
        self._barred: dict[str, int] = {}  # of requests with min_tokens, the position before which no stop token may be
        self._committed = 0
        self._exits: dict[str, list[int]] = {}
        self._made: tuple[torch.Tensor | None, Any] = None, None  # metadata, and the lengths it was made for
        self._latest: tuple[list[str], list[int], Step] | None = None  # of bare steps the last: requests, their starts

    # The engine's start.

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; then the machine for mixed-depth passes, unless vLLM is only profiling."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if kwargs.get("is_profiling", False) or (args and args[0]):
            return
        names, options = self.get_model().layer_names, self._options
        layers = self.compilation_config.static_forward_context
        self._pool = Pool.of(self.kv_cache_config, names, layers)
        # A pass of mixed depth: loop 1's layers, which the compiled graph names, on the caches of all loops.
        self._layers = {name: copy(layers[name]) for name in names[0]}
        for layer, cache in zip(self._layers.values(), self._pool.caches, strict=True):
            layer.bind_kv_cache(cache)
        of_layer = {name: group for groups in self.attn_groups for group in groups for name in group.layer_names}
        self._attention = [of_layer[loop[0]] for loop in names]
        requests = self.scheduler_config.max_num_seqs
        self._block_size = self.input_batch.block_table[self._pool.groups[0]].block_size
        if options.shares:
            self._sharing = Sharing(options.kv_sharing, options.kv_window, self._block_size)
            for table in self.input_batch.block_table.block_tables:
                table.slot_mapping_mode = SlotMappingMode.NONE  # ours to work out, from the blocks of every loop
        machine = Passes(
            slots=slots_needed(self._loops, self._burst, requests),
            hidden_size=self.model_config.get_hidden_size(),
            block_size=self._block_size,
            dtype=self.model_config.dtype,
            device=self.device,
            embed=self.model.embed_input_ids,
            model=self._one_pass,
            choose=self._choose,
            loops=self._loops,
            sharing=self._sharing,
            caches=self._pool.caches if options.kv_sharing == AVERAGE else (),
            kernels=is_own(self._attention[0].backend),
        )
        window = options.kv_window if options.shares else None
        limit = self.scheduler_config.max_num_batched_tokens
        self._waves = Waves(self._loops, self._burst, requests, machine, window, limit)

    def shutdown(self) -> None:
        """As vLLM does, which then frees the KV cache."""
        self._waves = self._latest = None
        self._layers, self._pool = {}, None
        super().shutdown()

    @torch.inference_mode()
    def time_passes(self) -> None:
        """Before the first request: what passes of so many rows cost, for the pace to start with.

        And one pass of every size that is compiled by itself, so that no trial of the pace has to pay for it.
        The rows are of no request; they stand in vLLM's null block. Every rank runs the same passes. Passes of more
        rows than there are slots stand for those with prompts in them.
        """
        assert self._waves is not None
        machine: Passes = self._waves.machine
        slots = machine.pool.shape[0]
        timed = {bucket(rows) for rows in range(1, MOST_TIMED + 1)}
        for size in sorted({*timed, *compiled(min(MOST_COMPILED, slots), self.device.type)}):
            if size > self._waves.limit:
                break
            rows = [(0, Row(0, 0, number % slots)) for number in range(size)]
            for number in range(TIMED if size in timed else 1):
                tables = torch.zeros(len(self._pool.groups), 1, 1, dtype=torch.int32, device=self.device)
                machine.step = Step(tables, prompts=[1])
                began = perf_counter()
                machine.run(rows, [], (), 0)
                self.model.compute_logits(machine.kept([row for _, row in rows])).argmax(-1).tolist()
                if number:  # the first of a size may compile or allocate
                    self._waves.counts.shapes.append((size, perf_counter() - began))

    # Requests come, wait and go.

    def _update_states(self, scheduler_output: Any) -> Any:
        lost = set(scheduler_output.finished_req_ids) | scheduler_output.scheduled_cached_reqs.resumed_req_ids
        lost |= scheduler_output.preempted_req_ids or set()
        lost |= {new.req_id for new in scheduler_output.scheduled_new_reqs}
        if self._waves:
            for request in lost:
                self._waves.forget(request)
                self._lookups.pop(request, None)
            if lost:
                self._latest = None
        for request in scheduler_output.finished_req_ids:
            self._watches.pop(request, None)
            self._led.discard(request)
            self._barred.pop(request, None)
        result = super()._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params.min_tokens:
                state = self.requests[new.req_id]
                self._barred[new.req_id] = state.num_prompt_tokens + new.sampling_params.min_tokens
            asked = (new.sampling_params.extra_args or {}).get("ouro_anytime", 0)
            if asked:
                self._watches[new.req_id] = Watch(traced=asked > 1)
            if leads(new.sampling_params, self._depths[new.req_id]):
                self._led.add(new.req_id)
        return result

    # The forward.

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, remembering that this is a step, whose metadata may be ours to build.

        A plain one, until its tokens are sampled, is what vLLM does on servers that do not speculate.
        """
        self._pace, self._ahead = getattr(scheduler_output, PLUGIN, self._pace), None
        self._bare = self._pace.plain
        self._own_step = self._waves is not None and not (self._bare and self._sharing is None)
        self.speculative_config = None if self._pace.plain else self.vllm_config.speculative_config
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._own_step = False

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_step and self._sharing is not None:
            return {}, {}  # see `_build_attention_metadata`
        return super()._get_slot_mappings(*args, **kwargs)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_step:
            self._bare = self._nothing_ahead()
            self._own_step = not self._bare or self._sharing is not None
        if not self._own_step:
            return super()._build_attention_metadata(*args, **kwargs)
        # It is built in `_model_forward`. The second value only has to be there for vLLM to call the drafter.
        return {}, object()

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        if self._pace.plain and self._waves is not None and self._waves.flights and self._scheduled is not None:
            for request in self.input_batch.req_ids:  # who drafts again starts from what is committed
                self._waves.forget(request)
        chunks = self._lockstep()
        if chunks or not self._own_step:
            began, context = perf_counter(), nullcontext()
            if chunks:
                context = override_forward_context(self._with_shared(chunks, positions.shape[0]))
            with context:
                hidden = super()._model_forward(
                    input_ids, positions, intermediate_tensors, inputs_embeds, **model_kwargs
                )
            if chunks:
                self._waves.machine.fold((), chunks, self._loops)
            if self._waves is not None:  # on a GPU the passes of a plain step are only launched here
                self._waves.counts.seconds += perf_counter() - began
            return hidden
        self._latest = None
        if self._bare:
            return self._wave_forward(input_ids)
        try:
            return self._wave_forward(input_ids)
        except Exception:
            self._survive("in this step; its rows are computed again, plainly")
            self._waves.lose()
            return self._wave_forward(input_ids, follow=False)

    def _lockstep(self) -> list[Chunk]:
        """Under sharing the chunks of a bare step, if they can run in one stage: all loops of all of them in turn."""
        if not (self._own_step and self._bare):
            return []
        stages = self._stages(self._whole())
        return stages[0] if len(stages) == 1 else []

    def _whole(self) -> list[Chunk]:
        """All that is scheduled, as chunks: nothing of it is in flight."""
        chunks, where = [], 0
        for index, request in enumerate(self.input_batch.req_ids):
            count = self._scheduled.num_scheduled_tokens[request]
            start = int(self.input_batch.num_computed_tokens_cpu[index])
            chunks.append(Chunk(index, start, count, where, self._depths[request].loops))
            where += count
        return chunks

    def _with_shared(self, chunks: list[Chunk], rows: int) -> ForwardContext:
        """This step of vLLM's own as a forward context whose rows read what loops share; rows: with padding."""
        machine, starts = self._waves.machine, [chunk.start for chunk in chunks]
        machine.step, requests = self._onward(chunks) or self._step(), list(self.input_batch.req_ids)
        metadata, slots = {}, {}
        for loop, common in enumerate(machine.lockstep(chunks)):
            names, written = self.get_model().layer_names[loop], common.slot_mapping
            if written.shape[0] < rows:
                written = torch.nn.functional.pad(written, (0, rows - written.shape[0]), value=PAD_SLOT_ID)
            # Each loop asks its own builder: some backends keep what they made for the last one that asked.
            metadata.update(dict.fromkeys(names, self._metadata(common, loop)))
            slots.update(dict.fromkeys(names, written))
        # Where a request has more than one piece, the starts say nothing of the next step's.
        self._latest = (requests, starts, machine.step) if len(starts) == len(requests) else None
        return replace(get_forward_context(), attn_metadata=metadata, slot_mapping=slots)

    def _wave_forward(self, input_ids: torch.Tensor, follow: bool = True) -> torch.Tensor:
        """Hidden states [N, D] of the N scheduled tokens, each after the loop it is read after.

        Of bare steps those come here that take several stages. follow: rows may run ahead of these; without, nothing is
        read out but for the gate.
        """
        assert self._waves is not None
        waves, machine = self._waves, self._waves.machine
        lanes, chunks, layout = ([], self._whole(), []) if self._bare else self._claimed()
        stages = self._stages(chunks)
        fresh, ends = self._step(), []
        for number, stage in enumerate(stages, start=1):
            machine.step = step = replace(fresh)
            if stage:
                step.chunk_ids = torch.cat([self._chunk_ids(chunk, input_ids) for chunk in stage]).long()
                step.exits = self._exits_of(stage)
            boarded = lanes if number == len(stages) else []
            waves.forward(boarded, stage, follow and not self._textbook, self._pace.apart)
            if stage:
                ends += zip(stage, step.chunks_read.split([chunk.tokens for chunk in stage]), strict=True)
        self._lanes = lanes
        kept = machine.kept([row for lane in lanes for row in lane.flight.rows[: lane.flight.held]])
        if not chunks:
            return kept
        hidden = kept.new_empty(sum(self._scheduled.num_scheduled_tokens.values()), kept.shape[1])
        hidden[torch.tensor(layout, dtype=torch.int64, device=self.device)] = kept
        for chunk, end in ends:
            hidden[chunk.where : chunk.where + chunk.tokens - chunk.lead] = end[chunk.lead :]
        return hidden

    def _claimed(self) -> tuple[list[Lane], list[Chunk], list[int]]:
        """Of each request its lane; what it has no rows for, as chunks; and which scheduled tokens [N] lanes hold."""
        waves, batch, scheduled = self._waves, self.input_batch, self._scheduled
        counts = [scheduled.num_scheduled_tokens[request] for request in batch.req_ids]
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        discarded = self.discard_request_mask.np[: batch.num_reqs].tolist()
        lanes, chunks, layout, where = [], [], [], 0
        for index, (request, start, count) in enumerate(zip(batch.req_ids, starts, counts, strict=True)):
            state, depth = self.requests[request], self._depths[request]
            flight = waves.flight(request, depth.loops, depth.gated)
            claimed = 0
            if discarded[index]:  # a prompt that ends in a later step
                waves.free += flight.ground()
            else:
                known = len(scheduled.scheduled_spec_decode_tokens.get(request, ())) + 1
                tail = batch.token_ids_cpu[index, start + count - known : start + count].tolist()
                claimed = waves.claim(flight, start + count - known, tail)
                self._limit(index, flight, state)
            lead = 0 if flight.missing is None else max(0, start - flight.missing)
            if claimed < count or lead:
                chunks.append(Chunk(index, start - lead, lead + count - claimed, where, depth.loops, lead))
            # What follows a prompt reads the shared keys and values of that prompt, which are not there yet.
            waits = self._sharing is not None and start < state.num_prompt_tokens
            lanes.append(self._lane(index, flight, not discarded[index], waits))
            layout += range(where + count - claimed, where + count)
            where += count
        return lanes, chunks, layout

    def _lane(self, index: int, flight: Flight, decided: bool, waits: bool = False) -> Lane:
        """decided: this step decides a token of the request. waits: see `Lane`."""
        request = self.input_batch.req_ids[index]
        params, watch = self.requests[request].sampling_params, self._watches.get(request)
        follows = decided and speculates(params) and not (self._textbook and flight.gated)
        traced, lookup = watch is not None and watch.traced, self._ready_lookup(request, params)
        return Lane(index, flight, follows, self._pace.entry, lookup, traced, waits, self._pace.guesses)

    def _nothing_ahead(self) -> bool:
        """Whether this step runs bare: what vLLM scheduled and nothing else, as plain decoding does.

        So that nobody's first token waits for rows behind it, that is also how prompts run: those that have a step to
        themselves, and others where the pace says so. Rows of requests that decode beside them wait meanwhile. A step
        that verifies drafts has their rows already. With a request in it for which something is always to run ahead
        (`options.leads`) no step is bare.
        """
        if not self._burst or self._pace.plain:
            return True
        if self._scheduled.scheduled_spec_decode_tokens:
            return False
        batch = self.input_batch
        if self._led and not self._led.isdisjoint(batch.req_ids):
            return False
        if self._pace.bare:
            return True
        starts = batch.num_computed_tokens_cpu
        return all(
            starts[index] < self.requests[request].num_prompt_tokens for index, request in enumerate(batch.req_ids)
        )

    def _stages(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """What runs in lockstep, one after the other; flights go with the last. One stage, unless KV is shared.

        Then what has been generated once and is computed again, after preemption, waits for what it reads as shared:
        all prompts of this step first, since vLLM lets one request use blocks that another fills in the same step.
        """
        sharing = self._sharing
        if sharing is None:
            return [sorted(chunks, key=lambda chunk: -chunk.loops)]
        batch, stages = self.input_batch, [[]]
        resumed = self._scheduled.scheduled_cached_reqs.resumed_req_ids
        for chunk in chunks:
            request = batch.req_ids[chunk.index]
            prompt = self.requests[request].num_prompt_tokens
            runs = list(sharing.runs(chunk.start, chunk.start + chunk.tokens, prompt))
            if chunk.start >= prompt and request not in resumed:
                runs = runs[1:]  # what comes before was computed in earlier steps
            for number, (first, until) in enumerate(runs):
                if number == len(stages):
                    stages.append([])
                for begin, stop in sharing.pieces(first, until, prompt):
                    where = chunk.where + begin - chunk.start
                    stages[number].append(Chunk(chunk.index, begin, stop - begin, where, chunk.loops))
        # Where a chunk ends with the prompt, the row behind it is of a generated token.
        generated = any(
            chunk.start + chunk.tokens >= self.requests[batch.req_ids[chunk.index]].num_prompt_tokens
            for chunk in chunks
        )
        if not self._bare and (generated or (chunks and resumed)):
            stages.append([])
        return stages

    def _exits_of(self, chunks: list[Chunk]) -> ExitPick | None:
        """Where the gate lets the rows of these chunks go, if it is asked for any."""
        depths = [self._depths[self.input_batch.req_ids[chunk.index]] for chunk in chunks]
        if not any(depth.gated for depth in depths):
            return None
        tokens = [chunk.tokens for chunk in chunks]
        pool = self._waves.machine.pool
        return ExitPick(depths, tokens, pool.new_empty(sum(tokens), pool.shape[1]), self.model.exit_logits)

    def _chunk_ids(self, chunk: Chunk, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids of a chunk, [tokens]; what leads it is not among the step's scheduled ones."""
        scheduled = input_ids[chunk.where : chunk.where + chunk.tokens - chunk.lead]
        if not chunk.lead:
            return scheduled
        led = self.input_batch.token_ids_cpu[chunk.index, chunk.start : chunk.start + chunk.lead]
        return torch.cat([torch.from_numpy(led).to(scheduled), scheduled])

    def _look_up(self) -> None:
        """Let each lane look up what has been committed of its request, if lookups are fed, or check its draft."""
        lengths = self.input_batch.num_tokens_no_spec
        for lane in self._lanes:
            request = self.input_batch.req_ids[lane.index]
            if lane.speculates and (self._pace.entry == 0 or lane.lookup is not None):
                lane.lookup = self._lookups.setdefault(request, Lookup())
                known = slice(len(lane.lookup.tokens), int(lengths[lane.index]))
                lane.lookup.extend(self.input_batch.token_ids_cpu[lane.index, known].tolist())

    def _ready_lookup(self, request: str, params: Any) -> Lookup | None:
        """The lookup for rows that enter while somebody waits.

        Not yet there for a new request: reading a prompt takes its time. A draft needs no prompt.
        """
        draft = (params.extra_args or {}).get("ouro_draft")
        if draft and request not in self._lookups:
            self._lookups[request] = Lookup(list(draft), self.requests[request].num_prompt_tokens)
        return None if self._pace.entry and not draft else self._lookups.get(request)

    def _limit(self, index: int, flight: Flight, state: Any) -> None:
        """How far rows may run ahead of what is committed: allocated slots, the answer's length, its end."""
        params, batch = state.sampling_params, self.input_batch
        blocks = min(int(batch.block_table[group].num_blocks_per_row[index]) for group in set(self._pool.groups))
        flight.end = min(blocks * self._block_size, self.max_model_len)
        if params.max_tokens is not None:
            flight.end = min(flight.end, state.num_prompt_tokens + params.max_tokens - 1)
        # Not all_stop_token_ids, which names the end of sequence also where it is ignored.
        flight.stops = frozenset((params.eos_token_id, *(params.stop_token_ids or ())))

    def _onward(self, chunks: list[Chunk]) -> Step | None:
        """For the passes of a step of one token per request, if the one before was of the token before of each."""
        if self._latest is None or any(chunk.tokens > 1 for chunk in chunks):
            return None
        requests, before, step = self._latest
        if requests != self.input_batch.req_ids or [chunk.start - 1 for chunk in chunks] != before:
            return None
        return self._waves.machine.onward(step)

    def _step(self) -> Step:
        """For the passes of this step: block ids [R, B, W] of its batch, W the most blocks any request has."""
        tables = [self.input_batch.block_table[group] for group in self._pool.groups]
        requests = self.input_batch.num_reqs
        width = max(int(table.num_blocks_per_row[:requests].max()) for table in dict.fromkeys(tables))
        ids = self._pool.ids([table.get_device_tensor(requests)[:, :width] for table in tables])
        return Step(ids, [self.requests[request].num_prompt_tokens for request in self.input_batch.req_ids])

    def _one_pass(self, positions: torch.Tensor, hidden: torch.Tensor, common: CommonAttentionMetadata) -> torch.Tensor:
        """One pass of rows of any depth: positions [N], hidden [N, D] -> [N, D], valid until the next pass."""
        rows = positions.shape[0]
        mode, batch = self.cudagraph_dispatcher.dispatch(num_tokens=rows, invalid_modes={CUDAGraphMode.FULL})
        slots, computed = common.slot_mapping, max(batch.num_tokens, rounded(rows, self.device.type))
        if computed > rows:
            padding = computed - rows
            positions = torch.nn.functional.pad(positions, (0, padding))
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
            slots = torch.nn.functional.pad(slots, (0, padding), value=PAD_SLOT_ID)
        metadata = self._metadata(common)
        with set_forward_context(
            dict.fromkeys(self._layers, metadata),
            self.vllm_config,
            num_tokens=computed,
            cudagraph_runtime_mode=mode,
            batch_descriptor=batch,
            slot_mapping=dict.fromkeys(self._layers, slots),
        ):
            get_forward_context().no_compile_layers = self._layers
            return self.get_model().model(positions, hidden)[:rows]

    def _metadata(self, common: CommonAttentionMetadata, loop: int = 0) -> Any:
        """What the attention backend reads. Of sequences that only moved on to their next loop, the blocks alone.

        loop: 0-based, whose layers read it, as far as vLLM tells loops apart.
        """
        group, (made_for, made) = self._attention[loop], self._made
        if made_for is common.seq_lens:
            moved = at_other_blocks(group.get_metadata_builder(), made, common)
            if moved is not None:
                return moved
        self._made = common.seq_lens, group.build_metadata(common)
        return self._made[1]

    # Readouts and draws.

    def _choose(self, hidden: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> list[int]:
        """Tokens [M] for hidden states [M, D] of (lane, row): what vLLM's sampler would take for the next position.

        The probabilities of a draw that may become a draft stay with its row. Some at a time: vLLM set no memory aside
        for logits of all rows of a large batch.
        """
        chosen = []
        for start in range(0, len(rows), MOST_READ):
            some = slice(start, start + MOST_READ)
            chosen += self._chosen(hidden[some], rows[some])
        return chosen

    def _chosen(self, hidden: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> list[int]:
        """See `_choose`."""
        batch = self.input_batch
        logits = self.model.compute_logits(hidden).to(torch.float32)
        if self._barred:
            for number, (lane, row) in enumerate(rows):
                request = batch.req_ids[lane]
                if row.position + 1 < self._barred.get(request, 0):
                    logits[number, list(self.requests[request].sampling_params.all_stop_token_ids)] = -torch.inf
        self._let_go(hidden, rows)
        tokens = self.sampler.greedy_sample(logits)
        if batch.random_reqs:
            drawing = {batch.req_id_to_index[request] for request in batch.random_reqs}
            random = [number for number, (lane, _) in enumerate(rows) if lane in drawing]
            if random:
                numbers = torch.tensor(random, device=self.device)
                tokens[numbers] = self._draw(logits[numbers], [rows[number] for number in random]).to(tokens.dtype)
        chosen = tokens.tolist()
        self._note(hidden, logits, rows, chosen)
        return chosen

    def _draw(self, logits: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> torch.Tensor:
        """Tokens [M] of rows of sampled requests, logits [M, V]. See `_choose`."""
        names, metadata = self.input_batch.req_ids, self.input_batch.sampling_metadata
        lanes = torch.tensor([lane for lane, _ in rows], device=self.device)
        scaled = logits / metadata.temperature[lanes, None]
        top_k = None if metadata.top_k is None else metadata.top_k[lanes]
        top_p = None if metadata.top_p is None else metadata.top_p[lanes]
        scaled = apply_top_k_top_p(scaled, top_k, top_p)
        generators, deciding = {}, []
        for number, (lane, row) in enumerate(rows):
            generators[number] = self.generator(names[lane], row.position + 1)
            last = 1 if self._textbook else self._depths[names[lane]].loops
            if row.exit or row.depth + 1 == last:
                deciding.append(number)
        if deciding:
            probabilities = scaled[torch.tensor(deciding, device=self.device)].softmax(dim=-1, dtype=torch.float32)
            for number, of_row in zip(deciding, probabilities, strict=True):
                rows[number][1].memo = of_row
        return self.sampler.topk_topp_sampler(scaled, generators, None, None)[0]

    def _note(
        self, hidden: torch.Tensor, logits: torch.Tensor, rows: Sequence[tuple[int, Row]], chosen: Sequence[int]
    ) -> None:
        """Rows of traced requests keep the probability of what they chose, at temperature 1, and the gate's lambda."""
        if not any(watch.traced for watch in self._watches.values()):
            return
        numbers = []
        for number, (lane, _) in enumerate(rows):
            watch = self._watches.get(self.input_batch.req_ids[lane])
            if watch is not None and watch.traced:
                numbers.append(number)
        if not numbers:
            return
        picked = torch.tensor(numbers, device=self.device)
        of_chosen = torch.tensor([[chosen[number]] for number in numbers], device=self.device)
        probabilities = logits[picked].softmax(dim=-1).gather(1, of_chosen)[:, 0].tolist()
        gates = self.model.exit_logits(hidden[picked]).to(torch.float32).sigmoid().tolist()
        for number, said in zip(numbers, zip(probabilities, gates, strict=True), strict=True):
            rows[number][1].said.append(said)

    def _let_go(self, hidden: torch.Tensor, rows: Sequence[tuple[int, Row]]) -> None:
        """Ask the gate about the rows of requests that have one: hidden states [M, D] of M times (lane, row)."""
        if not self._led:  # who has a gate is one of them
            return
        depths = [self._depths[self.input_batch.req_ids[lane]] for lane, _ in rows]
        asked = [number for number, depth in enumerate(depths) if depth.gated]
        if not asked:
            return
        chances = chance(self.model.exit_logits(hidden[torch.tensor(asked, device=self.device)])).tolist()
        for number, leaving in zip(asked, chances, strict=True):
            row, depth = rows[number][1], depths[number]
            row.staying *= 1.0 - leaving
            loop = row.depth + 1
            if depth.least <= loop < depth.loops and 1.0 - row.staying >= depth.threshold:
                row.exit = loop

    def _get_spec_decode_draft_probs(self, spec_decode_metadata: Any) -> torch.Tensor | None:
        """Probabilities [drafts, V] that the drafts were drawn from; None, vLLM's word for unknown, if one lacks.

        One lacks after a failure only. vLLM then judges the drafts as if they were certain, which leaves the
        distribution as it is but not what a seed draws.
        """
        if not self.input_batch.random_reqs:
            return None
        try:
            return self._draft_probabilities(spec_decode_metadata.num_draft_tokens)
        except Exception:
            self._survive("to say how likely its drafts were; they are judged without")
            return None

    def _draft_probabilities(self, counts: Sequence[int]) -> torch.Tensor | None:
        """See `_get_spec_decode_draft_probs`. counts: drafts per request."""
        batch = self.input_batch
        rows: list[torch.Tensor] = []
        for lane, drafts in zip(self._lanes, counts, strict=True):
            if batch.req_ids[lane.index] not in batch.random_reqs:
                rows += [torch.zeros(batch.vocab_size, device=self.device)] * drafts
                continue
            known = [row.memo for row in lane.flight.rows[: lane.flight.held][:drafts] if row.memo is not None]
            if len(known) != drafts:
                return None
            rows += known
        return torch.stack(rows) if rows else None

    # Drafting.

    def _survive(self, failure: str) -> None:
        """Say what failed, of the exception at hand, and go on.

        Raises:
            that exception: under tensor parallel. Other ranks may not have failed, and no two of them would run the
                same passes any more: wrong answers are worse than an engine that ends, as it does on vLLM's failures.
        """
        if self.parallel_config.tensor_parallel_size > 1:
            raise
        logger.exception("Self-speculation failed %s.", failure)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """vLLM stops drafting for everybody near the end of one context; here each flight has its own end."""
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """Take note of what was sampled; drafts are made in `take_draft_token_ids`."""
        self._ahead = self._pace.passes
        if not self._bare:
            try:
                self._take_note(sampled_token_ids)
            except Exception:
                self._survive("behind this step's tokens; the next one has no drafts")
                self._waves.lose()
                self._ahead = None
        return [[] for _ in sampled_token_ids]

    def _take_note(self, sampled_token_ids: list[list[int]]) -> None:
        """Of these tokens, per request, which vLLM has just added to what is committed."""
        lengths = self.input_batch.num_tokens_no_spec
        for lane, sampled in zip(self._lanes, sampled_token_ids, strict=True):
            if not sampled:
                continue
            flight, position = lane.flight, int(lengths[lane.index]) - 1
            self._committed += len(sampled)
            watch = self._watches.get(self.input_batch.req_ids[lane.index])
            if watch is not None:
                watch.commit(flight, position, len(sampled))
            if flight.gated:
                exits = {row.position: row.exit or row.depth for row in flight.rows[: flight.held]}
                read = range(position - len(sampled), position)
                # After a failed pass positions are computed in chunks, and counted as if read after the last loop.
                self._exits[self.input_batch.req_ids[lane.index]] = [exits.get(at, flight.loops) for at in read]
            self._decided(flight, position, sampled[-1])

    def _decided(self, flight: Flight, position: int, token: int) -> None:
        """The newest token of a request: its flight goes on from there, if anything may follow."""
        self._waves.restart(flight, position, token)
        if token in flight.stops or position >= flight.end:
            self._waves.free += flight.ground()

    def _depart(self) -> list[Lane]:
        """Lanes of a step that ran bare. Flights go on with the token it decided, if it did."""
        batch, lanes = self.input_batch, []
        self._waves.machine.step = self._step()
        for index, request in enumerate(batch.req_ids):
            flight = self._waves.flight(request, self._depths[request].loops)
            decided = not self.discard_request_mask.np[index]
            if decided:
                self._limit(index, flight, self.requests[request])
                position = int(batch.num_tokens_no_spec[index]) - 1
                self._decided(flight, position, int(batch.token_ids_cpu[index, position]))
            lanes.append(self._lane(index, flight, decided))
        return lanes

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Run the burst, or its next piece, and return all that is settled; None where there is nothing to do."""
        if self._ahead is None or self._waves is None:
            return None
        begins = self._ahead == self._pace.passes
        passes = min(self._pace.piece, self._ahead)
        self._ahead = self._ahead - passes or None
        return self._settled_drafts(passes, begins)

    @torch.inference_mode()
    def _settled_drafts(self, passes: int, begins: bool) -> DraftTokenIds | None:
        """So many passes, and what of each request is at the last loop. begins: they are the first of their burst.

        None where there was nothing to run, if it is not the first.
        """
        try:
            if begins:
                if self._bare:
                    self._lanes = self._depart()
                self._look_up()
            lanes = [lane for lane in self._lanes if lane.speculates]
            if self._textbook:
                most = min(self._burst, self._waves.most - 1)
                self._waves.draft(lanes, most)
                drafts = {lane.index: lane.flight.unsettled(most) for lane in lanes}
            else:
                if not self._waves.burst(lanes, passes, self._pace.awaited):
                    self._ahead = None
                    if not begins:
                        return None
                drafts = {lane.index: lane.flight.settled(self._burst) for lane in lanes}
        except Exception:
            self._survive("while drafting; this step goes without drafts")
            self._waves.lose()
            self._ahead, drafts = None, {}
        request_ids = list(self.input_batch.req_ids)
        for request, until in self._barred.items():
            # vLLM bars stop tokens behind the drafts by the tokens before them: that one must not be past min_tokens.
            index = self.input_batch.req_id_to_index.get(request)
            barred = until - self.requests[request].num_tokens
            if barred > 0 and index in drafts:
                drafts[index] = drafts[index][: barred - 1]
        return DraftTokenIds(request_ids, [drafts.get(index, []) for index in range(len(request_ids))])

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM does; what was measured goes along with the output."""
        output = super().sample_tokens(grammar_output)
        if self._waves and self._burst:
            if self._bare:
                depths, sampled = map(self._depths.__getitem__, output.req_ids), output.sampled_token_ids
                loops = [depth.loops for depth, tokens in zip(depths, sampled, strict=True) if tokens]
                self._committed += len(loops)
                self._waves.count_plain(loops)
            flights = self._waves.flights
            in_flight = sum(len(one.rows) + len(one.trail) for one in flights.values()) if flights else 0
            setattr(output, PLUGIN, StepReport(self._waves.report(), self._committed, in_flight, self._pace.plain))
            if self._exits:
                setattr(output, EXITS, self._exits)
            self._committed, self._exits = 0, {}
            if self._watches:
                watched = self._watches.keys() & output.req_id_to_index.keys()
                frames = {request: self._frame(request) for request in watched}
                setattr(output, FRAMES, frames)
        return output

    def _frame(self, request: str) -> Frame:
        state = self.requests[request]
        position = int(self.input_batch.num_tokens_no_spec[self.input_batch.req_id_to_index[request]]) - 1
        flight = self._waves.flights.get(request)
        return self._watches[request].frame(flight, position, position + 1 - state.num_prompt_tokens)
