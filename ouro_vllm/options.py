"""Options of a server (`--additional-config '{"ouro": {...}}'`) and of a request (`vllm_xargs`), parsed only here.

Pure Python: imports neither torch nor vLLM.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_vllm.names import PLUGIN

MOST_LOOPS = 16
SPECULATION = ("wavefront", "draft-verify")


class OptionError(ValueError):
    """An option that cannot be used; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class OuroOptions:
    """Options of one server.

    max_loops: loops of the stack per token, 1 to MOST_LOOPS. Above the checkpoint's `total_ut_steps` is extrapolation.
    fix_special_tokens: put right the special tokens of chat checkpoints that ship bos, eos and pad all the same.
    speculation: how a server with `SelfSpeculator` drafts, one of SPECULATION.
    entry_loop: loops a row has run when its readout is fed, 1 to max_loops; 0 is 1, and feeds guesses from the
        request's own text too; None lets the server choose as it measures.
    """

    max_loops: int
    fix_special_tokens: bool = True
    speculation: str = "wavefront"
    entry_loop: int | None = None

    @classmethod
    def parse(cls, additional_config: Any, total_ut_steps: int) -> "OuroOptions":
        """Read the `ouro` object of vLLM's additional config; total_ut_steps is the checkpoint's own depth.

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
        if isinstance(loops, bool) or not isinstance(loops, int) or not 1 <= loops <= MOST_LOOPS:
            raise OptionError(_wrong("max_loops", loops, f"a whole number from 1 to {MOST_LOOPS}"))
        fix = given.get("fix_special_tokens", True)
        if not isinstance(fix, bool):
            raise OptionError(_wrong("fix_special_tokens", fix, "true or false"))
        speculation = given.get("speculation", SPECULATION[0])
        if speculation not in SPECULATION:
            raise OptionError(_wrong("speculation", speculation, " or ".join(f'"{name}"' for name in SPECULATION)))
        entry = given.get("entry_loop")
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry <= loops):
            raise OptionError(_wrong("entry_loop", entry, f"a whole number from 0 to {loops}, the server's loops"))
        return cls(max_loops=loops, fix_special_tokens=fix, speculation=speculation, entry_loop=entry)


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request: `vllm_xargs` in the HTTP API, `SamplingParams.extra_args` in Python.

    ouro_speculate: whether its tokens are drafted, 1 or 0.
    ouro_anytime: set by the anytime endpoints: 1 to be told what is in flight, 2 with traces (see `anytime.frames`).
    ouro_draft: set by the anytime endpoints: token ids that may be the answer, verified in place of own drafts.
    """

    ouro_speculate: int = 1
    ouro_anytime: int = 0
    ouro_draft: tuple[int, ...] = ()

    @classmethod
    def parse(cls, extra_args: Any) -> "RequestOptions":
        """Read the options whose names begin with `ouro_`; others are not ours.

        Raises:
            OptionError: an unknown one, a wrong type or a value out of range.
        """
        given = {name: value for name, value in (extra_args or {}).items() if str(name).startswith(f"{PLUGIN}_")}
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
        return cls(ouro_speculate=int(speculate), ouro_anytime=int(anytime), ouro_draft=tuple(draft))


def options_of(params: Any) -> Mapping[str, Any]:
    """The checked `ouro_*` options, and whatever else stands beside them, of vLLM's SamplingParams (or None)."""
    return getattr(params, "extra_args", None) or {}


def speculates(params: Any) -> bool:
    """Whether a request with these sampling parameters (vLLM's SamplingParams) is drafted for.

    Not if it says so, and not where early readouts cannot know what vLLM's sampler will do to the last one: grammars
    and whatever depends on the tokens before.
    """
    return bool((params.extra_args or {}).get("ouro_speculate", 1)) and not (
        params.structured_outputs is not None
        or params.bad_words
        or params.allowed_token_ids
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.thinking_token_budget is not None
    )


def _close(name: Any, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    return f"{hint} Allowed: {', '.join(f'`{n}`' for n in names)}."


def _wrong(name: str, value: Any, allowed: str) -> str:
    return f"--additional-config: `{PLUGIN}.{name}` is {value!r}; it must be {allowed}."
