"""A kernel with everything it is called with: run on this machine's device, or compiled for one that is not here."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ouro_vllm.kernels import fp8

# What the interpreter stands in for: the oldest GPU we compile for.
INTERPRETED = GPUTarget("cuda", 80, 32)


@functools.cache
def current_target() -> GPUTarget:
    """The device that kernels run on here; under TRITON_INTERPRET=1, INTERPRETED."""
    return INTERPRETED if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors (compute units) `device` has; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check_caches(
    caller: str, key_cache: torch.Tensor, value_cache: torch.Tensor, entry: tuple[int, ...] | None = None
) -> int:
    """The kernels' `FP8` for a layer's caches, [num_blocks, block_size, kv_heads, head_size] of any strides.

    entry: (kv_heads, head_size) where the caller knows what they must be.

    Raises:
        TypeError, ValueError: caches that are not as above, or not of one shape and type.
    """
    alike = value_cache.shape == key_cache.shape and value_cache.dtype == key_cache.dtype
    if not alike or key_cache.dim() != 4 or (entry is not None and key_cache.shape[2:] != entry):
        sizes = "kv_heads, head_size" if entry is None else ", ".join(map(str, entry))
        raise ValueError(
            f"{caller}: the caches must be alike, [num_blocks, block_size, {sizes}]; they are "
            f"{tuple(key_cache.shape)} {key_cache.dtype} and {tuple(value_cache.shape)} {value_cache.dtype}."
        )
    return fp8.kind(key_cache.dtype)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    grid: programs along each axis. arguments: what is known when it runs. constants: `tl.constexpr` parameters.
    options: of the compiler; the default is for a kernel that goes over memory once.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 1})

    def run(self) -> None:
        """Start it on the current device and stream."""
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self._keywords)

    def compile(self, target: GPUTarget) -> Any:
        """Triton's CompiledKernel for `target`, specialised on these very arguments; needs no device, runs nothing."""
        with _pretended(target):
            return self.kernel.warmup(*self.arguments, grid=self.grid, **self._keywords)

    @property
    def _keywords(self) -> dict[str, Any]:
        # Triton 3.10 no longer fuses a product and a sum unasked.
        return self.constants | {"enable_fp_fusion": True} | self.options


class _NoDevice:
    """As much of a Triton driver as compiling asks for (triton/runtime/jit.py, `JITFunction.run` with warmup)."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # The key of Triton's table of compiled kernels: never that of a real device, which is a number.
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> None:
        return None


@contextmanager
def _pretended(target: GPUTarget) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(target))
    try:
        yield
    finally:
        config._active = before
