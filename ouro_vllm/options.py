"""Options of a server (`--additional-config '{"ouro": {...}}'`) and of a request (`vllm_xargs`), parsed only here.

Pure Python: imports neither torch nor vLLM.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_vllm.names import PLUGIN
from ouro_vllm.sharing import PER_LOOP, POLICIES

MOST_LOOPS = 16
SPECULATION = ("wavefront", "draft-verify")
CHECKPOINT = "checkpoint"


class OptionError(ValueError):
    """An option that cannot be used; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Depth:
    """How deep one request is computed.

    loops: its deepest loop, 1-based: the one its keys and values go up to, and its answer's without a gate.
    threshold: the exit gate's q in (0, 1]; a token is read after the first loop by which the chance of having left
        reaches it (arXiv 2510.25741, section 3: Q-exit). 1 leaves the gate alone.
    least: the gate reads no token before this loop.
    """

    loops: int
    threshold: float = 1.0
    least: int = 1

    @property
    def gated(self) -> bool:
        """Whether the gate has anything to decide."""
        return self.threshold < 1.0 and self.least < self.loops

    def full(self, loops: int) -> bool:
        """Whether every token is read after the last of `loops`, which the server runs."""
        return self.loops == loops and not self.gated


@dataclass(frozen=True)
class OuroOptions:
    """Options of one server.

    max_loops: loops of the stack per token, 1 to MOST_LOOPS. Above the checkpoint's `total_ut_steps` is extrapolation.
    fix_special_tokens: put right the special tokens of chat checkpoints that ship bos, eos and pad all the same.
    speculation: how a server with `SelfSpeculator` drafts, one of SPECULATION.
    entry_loop: loops a row has run when its readout is fed, 1 to max_loops; 0 is 1, and feeds guesses from the
        request's own text too; None lets the server choose as it measures.
    kv_sharing: one of `sharing.POLICIES`: whether loops read each other's keys and values of older tokens.
    kv_window: newest tokens of which a generated token reads its own loop, if they do; max_loops - 1 at least.
    loops, exit_threshold, min_loops: of requests that say nothing, see `Depth`; 0 loops is max_loops.
    """

    max_loops: int
    fix_special_tokens: bool = True
    speculation: str = "wavefront"
    entry_loop: int | None = None
    kv_sharing: str = PER_LOOP
    kv_window: int = 256
    loops: int = 0
    exit_threshold: float = 1.0
    min_loops: int = 1

    @property
    def shares(self) -> bool:
        """Whether loops share keys and values."""
        return self.kv_sharing != PER_LOOP

    @property
    def depth(self) -> Depth:
        """Of requests that say nothing about it."""
        return Depth(self.loops or self.max_loops, self.exit_threshold, self.min_loops)

    @classmethod
    def of(cls, vllm_config: Any) -> "OuroOptions":
        """Those of a server, from vLLM's whole configuration. Raises OptionError as `parse` does."""
        config = vllm_config.model_config.hf_config
        return cls.parse(vllm_config.additional_config, config.total_ut_steps, config.early_exit_threshold)

    @classmethod
    def parse(
        cls, additional_config: Any, total_ut_steps: int, early_exit_threshold: float | None = None
    ) -> "OuroOptions":
        """Read the `ouro` object of vLLM's additional config; the rest is what the checkpoint's config.json says.

        `exit_threshold` may be "checkpoint": the `early_exit_threshold` of config.json.

        Raises:
            OptionError: an unknown key, a wrong type or a value out of range.
        """
        given = additional_config.get(PLUGIN, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise OptionError(f"--additional-config: `{PLUGIN}` must be an object of options, got {given!r}.")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise OptionError(f"--additional-config: unknown option `{PLUGIN}.{name}`.{_close(name, names)}")
        if "max_loops" not in given and total_ut_steps > MOST_LOOPS:
            raise OptionError(
                f"config.json: `total_ut_steps` is {total_ut_steps}, and a server runs at most {MOST_LOOPS} loops. "
                f'Choose fewer with --additional-config \'{{"{PLUGIN}": {{"max_loops": {MOST_LOOPS}}}}}\'.'
            )
        loops = given.get("max_loops", total_ut_steps)
        if not _whole(loops, 1, MOST_LOOPS):
            raise OptionError(_wrong("max_loops", loops, f"a whole number from 1 to {MOST_LOOPS}"))
        fix = given.get("fix_special_tokens", True)
        if not isinstance(fix, bool):
            raise OptionError(_wrong("fix_special_tokens", fix, "true or false"))
        speculation = given.get("speculation", SPECULATION[0])
        if speculation not in SPECULATION:
            raise OptionError(_wrong("speculation", speculation, " or ".join(f'"{name}"' for name in SPECULATION)))
        entry = given.get("entry_loop")
        if entry is not None and not _whole(entry, 0, loops):
            raise OptionError(_wrong("entry_loop", entry, f"a whole number from 0 to {loops}, the server's loops"))
        policy = given.get("kv_sharing", PER_LOOP)
        if policy not in POLICIES:
            raise OptionError(_wrong("kv_sharing", policy, " or ".join(f'"{name}"' for name in POLICIES)))
        if policy != PER_LOOP and loops == 1:
            raise OptionError(
                f'--additional-config: `{PLUGIN}.kv_sharing` is "{policy}", and a model that runs one loop has nothing '
                f"to share. Leave it out, or raise `{PLUGIN}.max_loops`."
            )
        window, fewest = given.get("kv_window", cls.kv_window), max(1, loops - 1)
        if isinstance(window, bool) or not isinstance(window, int) or window < fewest:
            why = f"a whole number from {fewest} on: rows of {loops} loops are under way at once"
            raise OptionError(_wrong("kv_window", window, why))
        deepest = given.get("loops", loops)
        if not _whole(deepest, 1, loops):
            raise OptionError(_wrong("loops", deepest, f"a whole number from 1 to {loops}, the server's max_loops"))
        threshold = given.get("exit_threshold", 1.0)
        if threshold == CHECKPOINT:
            threshold = early_exit_threshold
            if not _share(threshold):
                raise OptionError(
                    f'--additional-config: `{PLUGIN}.exit_threshold` is "{CHECKPOINT}", and `early_exit_threshold` of '
                    f"config.json is {threshold!r}; it must be a number above 0, at most 1. Name a threshold instead."
                )
        if not _share(threshold):
            raise OptionError(
                _wrong("exit_threshold", threshold, f'a number above 0, at most 1 (full depth), or "{CHECKPOINT}"')
            )
        least = given.get("min_loops", 1)
        if not _whole(least, 1, deepest):
            raise OptionError(
                _wrong("min_loops", least, f"a whole number from 1 to {deepest}, the depth it is part of")
            )
        if policy != PER_LOOP and (deepest < loops or threshold < 1):
            raise OptionError(
                f'--additional-config: `{PLUGIN}.kv_sharing` is "{policy}", and what is shared comes from every loop: '
                "not with `loops` or `exit_threshold`. Leave out one of them."
            )
        return cls(
            max_loops=loops,
            fix_special_tokens=fix,
            speculation=speculation,
            entry_loop=entry,
            kv_sharing=policy,
            kv_window=window,
            loops=deepest if deepest < loops else 0,
            exit_threshold=float(threshold),
            min_loops=least,
        )


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request: `vllm_xargs` in the HTTP API, `SamplingParams.extra_args` in Python.

    ouro_speculate: whether its tokens are drafted, 1 or 0.
    ouro_loops: fixed depth, 1 to the server's max_loops; together with a threshold, the gate's deepest loop.
    ouro_exit_threshold: q of the exit gate, above 0 and at most 1 (full depth).
    ouro_min_loops: least depth under the gate.
    ouro_anytime: set by the anytime endpoints: 1 to be told what is in flight, 2 with traces (see `anytime.frames`).
    ouro_draft: set by the anytime endpoints: token ids that may be the answer, verified in place of own drafts.
    """

    ouro_speculate: int = 1
    ouro_loops: int | None = None
    ouro_exit_threshold: float | None = None
    ouro_min_loops: int | None = None
    ouro_anytime: int = 0
    ouro_draft: tuple[int, ...] = ()

    @classmethod
    def parse(cls, extra_args: Any) -> "RequestOptions":
        """Read the options whose names begin with `ouro_`; others are not ours.

        Raises:
            OptionError: an unknown one, a wrong type, or a value that no server takes.
        """
        given = {name: value for name, value in (extra_args or {}).items() if str(name).startswith(f"{PLUGIN}_")}
        if not given:
            return cls()
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                raise OptionError(f"vllm_xargs: unknown option `{name}`.{_close(name, names)}")
        speculate = given.get("ouro_speculate", 1)
        if speculate not in (0, 1) or not isinstance(speculate, int):
            raise OptionError(f"vllm_xargs: `ouro_speculate` is {speculate!r}; it must be 0 or 1.")
        anytime, draft = given.get("ouro_anytime", 0), given.get("ouro_draft", ())
        if anytime not in (0, 1, 2) or not isinstance(anytime, int):
            raise OptionError(f"vllm_xargs: `ouro_anytime` is {anytime!r}; it must be 0, 1 or 2.")
        if not isinstance(draft, list | tuple) or any(type(token) is not int or token < 0 for token in draft):
            raise OptionError("vllm_xargs: `ouro_draft` must be a list of token ids.")
        for name in ("ouro_loops", "ouro_min_loops"):
            if name in given and not _whole(given[name], 1, MOST_LOOPS):
                raise OptionError(f"vllm_xargs: `{name}` is {given[name]!r}; it must be a whole number from 1 on.")
        threshold = given.get("ouro_exit_threshold")
        if "ouro_exit_threshold" in given and not _share(threshold):
            raise OptionError(
                f"vllm_xargs: `ouro_exit_threshold` is {threshold!r}; it must be a number above 0, at most 1 (full "
                "depth)."
            )
        loops, least = given.get("ouro_loops"), given.get("ouro_min_loops")
        if loops is not None and least is not None and threshold is None:
            raise OptionError(
                "vllm_xargs: `ouro_loops` alone is a fixed depth, which `ouro_min_loops` contradicts. Give one of "
                "them, or `ouro_exit_threshold` too."
            )
        return cls(
            int(speculate), loops, None if threshold is None else float(threshold), least, int(anytime), tuple(draft)
        )

    def depth(self, server: OuroOptions) -> Depth:
        """What the request gets from a server with these options.

        Raises:
            OptionError: deeper than the server goes, a floor below the deepest loop, or less than full depth where
                loops share keys and values.
        """
        depth = self._depth(server)
        if server.shares and not depth.full(server.max_loops):
            raise OptionError(
                "vllm_xargs: `ouro_loops` and `ouro_exit_threshold` need a server whose loops do not share keys and "
                f'values; this one has kv_sharing "{server.kv_sharing}". Leave them out.'
            )
        return depth

    def check_draft(self, vocabulary: int, longest: int) -> None:
        """Raises OptionError for a draft that is no text: its tokens are fed as they are, and a wrong one would end
        the engine.

        vocabulary: tokens that the model knows. longest: of its contexts.
        """
        if len(self.ouro_draft) > longest:
            raise OptionError(
                f"vllm_xargs: `ouro_draft` has {len(self.ouro_draft)} tokens; the server's longest context "
                f"(max_model_len) has {longest}."
            )
        if self.ouro_draft and max(self.ouro_draft) >= vocabulary:
            raise OptionError(
                f"vllm_xargs: `ouro_draft` names token {max(self.ouro_draft)}; the model's are 0 to {vocabulary - 1}."
            )

    def _depth(self, server: OuroOptions) -> Depth:
        asked = server.depth
        if self.ouro_loops is not None and self.ouro_loops > server.max_loops:
            raise OptionError(
                f"vllm_xargs: `ouro_loops` is {self.ouro_loops}; this server runs 1 to {server.max_loops} loops "
                "(max_loops in its --additional-config)."
            )
        if self.ouro_loops is not None and self.ouro_exit_threshold is None:
            return Depth(self.ouro_loops)
        loops = asked.loops if self.ouro_loops is None else self.ouro_loops
        threshold = asked.threshold if self.ouro_exit_threshold is None else self.ouro_exit_threshold
        if self.ouro_min_loops is not None and self.ouro_min_loops > loops:
            raise OptionError(
                f"vllm_xargs: `ouro_min_loops` is {self.ouro_min_loops}, and the request's deepest loop is {loops}; "
                "the least must not be above it."
            )
        return Depth(loops, threshold, min(loops, self.ouro_min_loops or asked.least))


def depth_of(params: Any, server: OuroOptions) -> Depth:
    """Depth of a request with these parameters (vLLM's SamplingParams, or None for pooling). Raises OptionError."""
    return RequestOptions.parse(getattr(params, "extra_args", None)).depth(server)


def refuse_depth(vllm_config: Any) -> None:
    """Raises OptionError where a server cannot run requests of other than full depth: the runner is not ours."""
    if not str(vllm_config.parallel_config.worker_cls).startswith("ouro_vllm."):
        raise OptionError(
            "Depths other than the server's full one need Ouro's own worker, and this server has another "
            f"({vllm_config.parallel_config.worker_cls}). Start it on a CPU, CUDA or ROCm device without --worker-cls."
        )
    if vllm_config.use_v2_model_runner:
        raise OptionError(
            "Depths other than the server's full one need vLLM's V1 model runner. Start the server with "
            "VLLM_USE_V2_MODEL_RUNNER=0."
        )


def speculates(params: Any) -> bool:
    """Whether a request with these sampling parameters (vLLM's SamplingParams) is drafted for.

    Not if it says so, and not where early readouts cannot know what vLLM's sampler will do to the last one: grammars
    and whatever depends on the tokens before; nor where drafts cannot be judged beside it (`judged_apart`). Asked in
    every step, so options are not checked again.
    """
    return bool((params.extra_args or {}).get("ouro_speculate", 1)) and not (
        params.structured_outputs is not None
        or params.bad_words
        or params.allowed_token_ids
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.thinking_token_budget is not None
        or judged_apart(params)
    )


def judged_apart(params: Any) -> bool:
    """Whether no step with such a request in it may verify drafts, its own or another's.

    `logprob_token_ids`: vLLM's rejection sampler (v1/sample/rejection_sampler.py, 0.32) leaves these logprobs out
    or, where another request wants logprobs too, fails and ends the engine.
    """
    return bool(params.logprob_token_ids)


def leads(params: Any, depth: Depth) -> bool:
    """Whether rows of such a request are always to run ahead, in batches where drafting does not pay, too.

    Who watches wants to see what early loops say, a draft of the request's own is worth following, and the gate needs
    rows that go on behind their exits.
    """
    extra = params.extra_args or {}
    return bool(extra.get("ouro_anytime") or extra.get("ouro_draft") or depth.gated)


def salt(given: str | None, depth: Depth, server: OuroOptions) -> str | None:
    """What sets a request's prefix-cache blocks apart: its deepest loop, unless it is the server's, and its own salt.

    Blocks hold the keys and values of the loops that were run, whatever the gate read in between.
    """
    if depth.loops == server.max_loops and not (given or "").startswith(f"{PLUGIN}:"):
        return given
    return f"{PLUGIN}:{depth.loops}:{given or ''}"


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _close(name: Any, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"{hint} Allowed: {', '.join(f'`{n}`' for n in names)}."


def _wrong(name: str, value: Any, allowed: str) -> str:
    return f"--additional-config: `{PLUGIN}.{name}` is {value!r}; it must be {allowed}."
