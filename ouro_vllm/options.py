"""The server's options: `--additional-config '{"ouro": {...}}'`, parsed here and nowhere else.

Pure Python: imports neither torch nor vLLM.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ouro_vllm.names import PLUGIN

MOST_LOOPS = 16


class OptionError(ValueError):
    """An option that cannot be used; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class OuroOptions:
    """Options of one server.

    max_loops: loops of the stack per token, 1 to MOST_LOOPS. Above the checkpoint's `total_ut_steps` is extrapolation.
    fix_special_tokens: put right the special tokens of chat checkpoints that ship bos, eos and pad all the same.
    """

    max_loops: int
    fix_special_tokens: bool = True

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
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                allowed = ", ".join(f"`{n}`" for n in names)
                raise OptionError(f"--additional-config: unknown option `{PLUGIN}.{name}`.{hint} Allowed: {allowed}.")
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
        return cls(max_loops=loops, fix_special_tokens=fix)


def _wrong(name: str, value: Any, allowed: str) -> str:
    return f"--additional-config: `{PLUGIN}.{name}` is {value!r}; it must be {allowed}."
