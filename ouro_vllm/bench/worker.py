"""One engine of `ouro-vllm bench`: `python -m ouro_vllm.bench.worker`, asked by lines of JSON on stdin.

{"start": {...}} makes the engine, see `Engine`; {"measure": {...}} has it answer requests, see `Engine.measure`;
{"go_on": {}} goes on with that. Each gets one line of JSON on stdout: what the method yields or returns, or {"error":
"what went wrong"}. Everything else that is written to stdout goes to stderr. Ends with stdin.

The engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0): one that waits for requests waits on stdin.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import asdict
from itertools import cycle, islice, zip_longest
from statistics import mean, median
from time import perf_counter
from typing import Any

from ouro_vllm.bench.figures import Measurement, as_json
from ouro_vllm.names import MODEL_TYPE

PR_SET_PDEATHSIG = 1  # linux/prctl.h
BLOCK = 128  # tokens of the largest KV block that vLLM takes by itself
SPARE_BLOCKS = 2  # per loop: vLLM's null block, and one for good measure
GOLDEN = (5**0.5 - 1) / 2  # its multiples fill the unit interval evenly, however many there are
KEPT = ("passes", "rows", "lane_passes", "restarts", "dropped", "agreed", "judged", "settled")  # of Counts


def main() -> None:
    """Answer until stdin ends."""
    if sys.platform == "linux":
        # The parent stops this process between questions; killed, it could not let it go on and leave.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    questions = os.fdopen(os.dup(0))
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    engine: Engine | None = None
    measuring: Generator[Any, None, Any] = iter(())
    for line in iter(questions.readline, ""):
        try:
            ((what, details),) = json.loads(line).items()
            if what == "start":
                engine = Engine(**details)
                answer = engine.facts
            else:
                if what == "measure":
                    measuring = engine.measure(**details)
                answer = onward(measuring)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": str(error) or repr(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    if engine is not None:
        engine.llm.llm_engine.engine_core.shutdown()


def onward(steps: Generator[Any, None, Any]) -> Any:
    """What a generator yields next, or, once it is through, what it returns."""
    try:
        return next(steps)
    except StopIteration as end:
        return end.value


def blocks_needed(lengths: list[int], batch: int) -> int:
    """Most KV blocks per loop that `batch` requests of these lengths (tokens, lookahead included) hold at once."""
    return sum(sorted((-(-length // BLOCK) for length in lengths), reverse=True)[:batch]) + SPARE_BLOCKS


def block_bytes(cache: Any) -> float:
    """Bytes of a block of vLLM's KVCacheConfig. Its tensors each name the size of all that is allocated: under
    sharing those of loops lie over one another in it (vllm/v1/kv_cache_interface.py, `KVCacheTensor`)."""
    return max(tensor.size for tensor in cache.kv_cache_tensors) / cache.num_blocks


def recut(prompts: list[list[int]], length: int, count: int) -> list[list[int]]:
    """`count` prompts of `length` token ids each: all prompts in a row, again and again, cut anew."""
    endless = cycle(token for prompt in prompts for token in prompt)
    return [list(islice(endless, length)) for _ in range(count)]


def answer_length(tokens: int, number: int) -> int:
    """Tokens that request `number` (from 0) is given: `tokens` on average, from half of that to half as many again.

    On a server answers do not all end in one step, and prompts do not all come in one.
    """
    return max(1, tokens // 2 + round(tokens * ((0.5 + number * GOLDEN) % 1)))


class Engine:
    """vLLM's `LLM` with as much KV cache as the requests need, the same in every mode.

    Attributes:
        facts: what the conductor wants to know of it.
    """

    def __init__(
        self,
        model: str,
        prompts: list[str],
        tokens: int,
        batch: int,
        lookahead: int,
        dtype: str,
        context: int | None,
        more_groups: int,
        options: dict[str, Any],
    ) -> None:
        """tokens: per answer, on average. batch: most requests at once. lookahead: slots per request that speculation
        takes, in the mode that takes most. context: see `run.Plan`. more_groups: KV groups beside the loops', in the
        mode that has most. options: of `LLM`, what sets the mode apart."""
        began = perf_counter()
        import torch
        import vllm
        from transformers import AutoConfig, AutoTokenizer

        import ouro_vllm
        from ouro_vllm.config import check

        ouro_vllm.register()
        config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        if config.model_type != MODEL_TYPE:
            raise ValueError(
                f"{model} is no Ouro checkpoint: `model_type` of its config.json is {config.model_type!r}."
            )
        check(config)
        self.prompts = [tokenizer(text)["input_ids"] for text in prompts]
        if context is not None:
            self.prompts = recut(self.prompts, context, max(batch, len(self.prompts)))
        self.tokens = tokens
        repeated = [self.prompts[number % len(self.prompts)] for number in range(max(batch, len(self.prompts)))]
        lengths = [len(prompt) + tokens // 2 + tokens + lookahead for prompt in repeated]
        self.loops = config.total_ut_steps
        loop_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.loop_bytes = loop_values * getattr(torch, dtype).itemsize
        kv_bytes = self.loop_bytes * (self.loops + more_groups) * BLOCK * blocks_needed(lengths, batch)
        self.llm = vllm.LLM(
            model,
            dtype=dtype,
            max_num_seqs=batch,
            max_model_len=max(lengths),
            kv_cache_memory_bytes=kv_bytes,
            enable_prefix_caching=False,  # or repeated prompts would cost nothing
            disable_log_stats=True,
            seed=0,
            **options,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.speculates = "speculative_config" in options
        self.paced = self.speculates and not self.runner._textbook
        self.forwards, self.pass_seconds, self.out, self.away, self.runs = 0, 0.0, 0.0, 0.0, 0
        self.core.scheduler.clock = self.clock
        self._listen()
        self.facts = {
            "loops": self.loops,
            "prompt_tokens": [len(prompt) for prompt in self.prompts],
            "kv_gib": kv_bytes / 2**30,
            "start_seconds": perf_counter() - began,
            "device": self.runner.device.type,
            "threads": torch.get_num_threads(),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }

    def clock(self) -> float:
        """Seconds, but those in which others had their turn."""
        return perf_counter() - self.away

    def _listen(self) -> None:
        """Take the time of plain decoding's forwards, and the moment when a step's tokens leave the engine."""
        forward, after = self.runner._model_forward, self.core.post_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            hidden = forward(*args, **kwargs)
            self.pass_seconds += perf_counter() - began
            self.forwards += 1
            return hidden

        def noted(*args: Any, **kwargs: Any) -> Any:
            # In a server this runs once the tokens are on their way; in this process `step` returns them after it.
            self.out = self.clock()
            return after(*args, **kwargs)

        if not self.speculates:
            self.runner._model_forward = timed
        self.core.post_step = noted

    def measure(
        self,
        batch: int,
        requests: int,
        temperature: float,
        extra_args: dict[str, Any] | None = None,
        parts: int = 1,
    ) -> Generator[dict[str, Any], None, dict[str, Any]]:
        """Answer that many requests, never more than `batch` at once: the others wait in the engine.

        Until all are done more follow them, so that the batch is full to the end; what these are given counts as
        tokens, but their answers are not finished. Request i has prompt i, starting over when they are used up, seed
        i and `answer_length` i. Detokenisation, which a server does in another process, is left out. extra_args:
        `vllm_xargs` of all. parts: to stand aside between these, which have about as many tokens each.

        Yields:
            {"tokens": so far}, in between; the clock stands still until it is asked to go on.

        Returns:
            {"measurement": a Measurement, "outputs": token ids per request, "read": tokens by the loop, from the first,
            that they were read after}.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = [
            SamplingParams(
                temperature=temperature,
                seed=number,
                extra_args=extra_args,
                max_tokens=answer_length(self.tokens, number),
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            for number in range(3 * requests)
        ]
        prompts = [self.prompts[number % len(self.prompts)] for number in range(len(params))]
        entries: Counter[str] = Counter()
        scheduler = self.core.scheduler
        scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = batch
        pool, held = scheduler.kv_cache_manager.block_pool, (0, 0)  # tokens, blocks

        def stepped() -> float:
            nonlocal held
            if self.paced:
                entries["plain" if scheduler.pacer.plain else str(scheduler.pacer.entry)] += 1
            held = max(
                held,
                (
                    sum(request.num_computed_tokens for request in scheduler.running),
                    pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                ),
            )
            return self.out

        self.runs += 1
        gc.collect()
        read = list(self.core.scheduler.read)
        before = self._counted(behind=True)
        steps = answer(self.llm.llm_engine, f"{self.runs}", prompts, params, requests, batch, stepped, self.clock)
        expected = sum(one.max_tokens for one in params[:requests])
        outputs, waits, last, seconds = yield from self._in_parts(steps, expected, parts)
        tokens, outputs = sum(map(len, outputs)), outputs[:requests]
        measurement = Measurement(
            seconds=seconds,
            requests=requests,
            tokens=tokens,
            first_token=median(waits),
            decoding_seconds=sum(last),
            decoding_tokens=sum(map(len, outputs)) - len(outputs),
            kv_bytes=held[1] * block_bytes(scheduler.kv_cache_config) / max(1, held[0]),
            context=mean(len(prompts[i]) + params[i].max_tokens / 2 for i in range(requests)),
            loop_bytes=self.loop_bytes,
            entries=dict(entries),
            **self._between(before, self._counted(), tokens),
        )
        read = difference(self.core.scheduler.read, read)
        return {"measurement": as_json(measurement), "outputs": outputs, "read": read}

    def _in_parts(
        self, steps: Generator[int, None, Any], expected: int, parts: int
    ) -> Generator[dict[str, Any], None, Any]:
        """Run `answer`, standing aside after each of so many parts of the expected tokens but the last. Returns what it
        returns."""
        due = deque(expected * part / parts for part in range(1, parts))
        while True:
            try:
                tokens = next(steps)
            except StopIteration as end:
                return end.value
            if due and tokens >= due[0]:
                while due and tokens >= due[0]:
                    due.popleft()
                left = perf_counter()
                yield {"tokens": tokens}
                self.away += perf_counter() - left

    def _counted(self, behind: bool = False) -> Any:
        """Sums since the engine's start. behind: with those of the burst behind the latest step, whose tokens come with
        the next."""
        if self.speculates:
            sums = self.core.scheduler.totals
            if behind:
                sums.counts.add(self.runner._waves.counts)
            return asdict(sums)
        return self.forwards, self.pass_seconds

    def _between(self, before: Any, after: Any, tokens: int) -> dict[str, Any]:
        """What was counted between two values of `_counted`, as arguments of Measurement."""
        if not self.speculates:
            forwards, seconds = (late - early for early, late in zip(before, after, strict=True))
            rows = self.loops * tokens
            # Only on the CPU is a forward over when it returns.
            seconds = seconds if self.runner.device.type == "cpu" else None
            counts = {"passes": self.loops * forwards, "rows": rows, "lane_passes": rows, "committed": tokens}
            return {**counts, "pass_seconds": seconds}
        early, late = before["counts"], after["counts"]
        return {
            **{name: difference(late[name], early[name]) for name in KEPT},
            "pass_seconds": late["seconds"] - early["seconds"],
            "committed": after["committed"] - before["committed"],
        }


def answer(
    engine: Any,
    name: str,
    prompts: list[list[int]],
    params: list[Any],
    requests: int,
    batch: int,
    stepped: Callable[[], float],
    clock: Callable[[], float] = perf_counter,
) -> Generator[int, None, tuple[list[list[int]], list[float], list[float], float]]:
    """Have vLLM's LLMEngine answer the first `requests` prompts (token ids); it takes `batch` at once, in order.

    As long as one of them is under way those behind them take the places of the ones that are done; they are then
    broken off. name: no other call has it. stepped: called after each step, says when (by `clock`) its tokens left the
    engine.

    Yields:
        Tokens so far, after every step but the last.

    Returns:
        Token ids of each request; of the first ones the seconds from when there was a place for them to their first
        token, and from that to their last; and the seconds until the last of them was done: what is drafted behind that
        step would give tokens in the next.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    first, waits, decoding = [0.0] * len(prompts), [0.0] * len(prompts), [0.0] * len(prompts)
    for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": prompt}, asked)
    running, left, tokens, began = set(range(len(prompts))), requests, 0, clock()
    places = deque([began] * batch)  # since when they are free
    while left:
        news = engine.step()
        out = stepped()
        for output in news:
            number = int(output.request_id.rpartition("-")[2])
            if new := output.outputs[0].token_ids:
                if not outputs[number]:
                    first[number], waits[number] = out, out - places.popleft()
                decoding[number] = out - first[number]
                outputs[number] += new
                tokens += len(new)
            if output.finished:
                running.remove(number)
                places.append(out)
                left -= number < requests
        if left:
            yield tokens
    seconds = out - began
    engine.abort_request([f"{name}-{number}" for number in sorted(running)])
    while engine.has_unfinished_requests():
        engine.step()
    return outputs, waits[:requests], decoding[:requests], seconds


def difference(after: Any, before: Any) -> Any:
    """after - before, of numbers or entry by entry of lists."""
    if isinstance(after, list):
        return [late - early for late, early in zip_longest(after, before, fillvalue=0)]
    return after - before


if __name__ == "__main__":
    main()
