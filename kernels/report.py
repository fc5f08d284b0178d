"""`python -m ouro_vllm.kernels.report`: what the kernels take on GPUs that need not be here, and what they must move.

Every configuration is compiled as it would be at its call, and the figures are read out of the object that a GPU would
load: registers and stack of a cubin by the `cuobjdump` that comes with Triton, those of an AMD code object from its
metadata note (LLVM's AMDGPU usage guide, "Code Object V5 Metadata"). Shared memory is what the launch would ask for.
Bytes per decode step are computed, and set against published peaks: estimates, nothing is measured.
"""

import argparse
import itertools
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from typing import Any

import msgspec
import torch
import triton
from triton.backends.compiler import GPUTarget

from ouro_vllm.kernels import kv_fold, kv_write, loop_attention
from ouro_vllm.kernels.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory one block may have (CUDA C++ programming guide, compute capabilities; CDNA 3 ISA guide, LDS).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Bytes per second of memory (NVIDIA H100 SXM data sheet; AMD Instinct MI300X data sheet).
PEAKS = {"H100": 3.35e12, "MI300X": 5.3e12}
DTYPES = ("bfloat16", "float16", "float32", "fp8")
HEAD_SIZES = (64, 80, 128, 256)
# Query heads to a KV head.
GROUPS = (1, 4)
KERNELS = ("loop_attention", "kv_write", "kv_fold")


@dataclass(frozen=True)
class Usage:
    """Of one compiled kernel. registers: per thread. spilled: bytes of stack per thread (CUDA) or registers (AMD).

    shared: bytes per block; limit: what the device allows.
    """

    kernel: str
    configuration: str
    target: str
    registers: int
    spilled: int
    shared: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= self.limit


@dataclass(frozen=True)
class Looped:
    """Sizes of a looped model, in its `config.json`'s terms."""

    hidden: int
    layers: int
    intermediate: int
    kv_heads: int
    head_size: int
    loops: int

    def stack_bytes(self, element: int) -> int:
        """Weights of the shared stack, in elements of `element` bytes (no GQA: four square projections)."""
        return element * self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    def kv_bytes(self, element: int) -> int:
        """Keys and values of one token at one loop, over all layers."""
        return element * 2 * self.layers * self.kv_heads * self.head_size


OURO_1_4B = Looped(hidden=2048, layers=24, intermediate=5632, kv_heads=16, head_size=128, loops=4)


def usages(
    targets: Sequence[str], kernels: Sequence[str], dtypes: Sequence[str], sizes: Sequence[int], jobs: int = 1
) -> Iterator[Usage]:
    """Compiles everything asked for, in `jobs` processes; yields in the order of the arguments.

    Raises:
        RuntimeError: Triton's interpreter is on, which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled under the interpreter. Unset it.")
    parts = zip(*itertools.product(targets, kernels, dtypes, sizes), strict=True)
    with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        for found in (pool.map if pool else map)(_usages, *parts):
            yield from found


def _usages(name: str, kernel: str, dtype: str, size: int) -> list[Usage]:
    target, found = TARGETS[name], {}
    for label, launch in _cases(kernel, dtype, size, target):
        compiled = launch.compile(target)
        # Not all that sets two calls apart is there for the compiler to see.
        if compiled.hash not in found:
            what = launch.kernel.__name__.strip("_"), f"{dtype}, head {size}{label}", name
            found[compiled.hash] = Usage(*what, *_resources(compiled, target), SHARED_LIMIT[name])
    return list(found.values())


def _cases(kernel: str, dtype: str, head_size: int, target: GPUTarget) -> Iterator[tuple[str, Launch]]:
    """Calls of a kernel as a server makes them: (what sets it apart, launch)."""
    eight = torch.float8_e4m3fnuz if target.backend == "hip" else torch.float8_e4m3fn
    stored = eight if dtype == "fp8" else getattr(torch, dtype)
    # A cache of eight bits goes with queries, keys and values of any type.
    for compute, group in itertools.product(DTYPES[:-1] if dtype == "fp8" else [dtype], GROUPS):
        rows, heads, block_size = 64, 16, 16
        pool = torch.zeros(8, heads // group, block_size, 2 * head_size, dtype=stored)
        caches = pool.transpose(1, 2).split(head_size, dim=-1)
        query = torch.zeros(rows, heads, head_size, dtype=getattr(torch, compute))
        grouped = f", {group} to 1" if group > 1 else ""
        of = (f" of {compute}" if dtype == "fp8" else "") + grouped
        if kernel == "kv_fold":
            blocks = torch.zeros(2, 4, dtype=torch.int32)
            yield grouped, kv_fold.prepare(*caches, blocks, blocks[:, 0])
        elif kernel == "kv_write":
            key = query[:, : heads // group]
            yield of, kv_write.prepare(key, key, *caches, torch.zeros(rows, dtype=torch.int64))
        else:
            tables = torch.zeros(4, rows, 16, dtype=torch.int32)
            for many, splits in itertools.product((False, True), (1, loop_attention.MOST_SPLITS)):
                plan = loop_attention.plan(
                    [0] * rows if many else range(rows),
                    [0] * rows,
                    [rows - 1] * rows,
                    [0] * rows,
                    [0] * rows,
                    heads=heads,
                    kv_heads=heads // group,
                    head_size=head_size,
                    dtype=query.dtype,
                    device="cpu",
                    splits=splits,
                    target=target,
                )
                label = f", {'many' if many else 'few'} rows{of}{', split' if splits > 1 else ''}"
                for launch in loop_attention.prepare(query, *caches, tables, plan, 1.0, 1.0, 1.0, query, target=target):
                    yield label, launch


def _resources(compiled: Any, target: GPUTarget) -> tuple[int, int, int]:
    """(registers, spilled, shared bytes) of a compiled kernel."""
    if target.backend == "hip":
        kernel = amd_metadata(compiled.asm["hsaco"])["amdhsa.kernels"][0]
        spilled = kernel[".vgpr_spill_count"] + kernel[".sgpr_spill_count"]
        # Triton's LDS is given at launch; a code object may have some of its own.
        shared = max(compiled.metadata.shared, kernel[".group_segment_fixed_size"])
        return kernel[".vgpr_count"], spilled, shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = dict(part.split(":") for part in text.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    return int(figures["REG"]), int(figures["STACK"]) + int(figures["LOCAL"]), compiled.metadata.shared


def amd_metadata(code_object: bytes) -> dict[str, Any]:
    """The metadata of an AMD code object: a note of type 32 and name AMDGPU, in MessagePack.

    Raises:
        ValueError: no such note.
    """
    # ELF64: the table of section headers, of which sh_type 7 are notes.
    table, count = struct.unpack_from("<Q", code_object, 0x28)[0], struct.unpack_from("<H", code_object, 0x3C)[0]
    for number in range(count):
        kind, offset, size = struct.unpack_from("<4xI16xQQ", code_object, table + 64 * number)
        place = offset
        while kind == 7 and place < offset + size:
            name_size, value_size, note = struct.unpack_from("<III", code_object, place)
            name = place + 12
            value = name + (name_size + 3) // 4 * 4
            if note == 32 and code_object[name : name + 6] == b"AMDGPU":
                return msgspec.msgpack.decode(code_object[value : value + value_size])
            place = value + (value_size + 3) // 4 * 4
    raise ValueError("the code object has no AMDGPU metadata note")


@dataclass(frozen=True)
class Step:
    """Bytes that one decode step of a request must read: `passes` runs of the stack, each with its KV."""

    name: str
    passes: int
    weights: int
    kv: int


def steps(model: Looped, context: int, window: int, element: int = 2) -> list[Step]:
    """A token of plain decoding, and a pass of the wavefront, which commits a token where drafts agree; batch 1.

    A shared page is read once in a pass, for all rows of the request; rows of R depths read R windows of their own.
    """
    stack, entry, loops = model.stack_bytes(element), model.kv_bytes(element), model.loops
    inside = min(window, context)
    return [
        Step("plain, per_loop", loops, loops * stack, loops * context * entry),
        Step("plain, shared", loops, loops * stack, loops * context * entry),
        Step("wavefront, per_loop", 1, stack, loops * context * entry),
        Step("wavefront, shared", 1, stack, (context - inside + loops * inside) * entry),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def estimates(model: Looped, contexts: Sequence[int], window: int, rate: float) -> str:
    """The table of bytes per decode step, and the shares of peak bandwidth at `rate` steps per second."""
    rows = []
    for context in contexts:
        for step in steps(model, context, window):
            moved = step.weights + step.kv
            shares = [f"{moved / peak * 1e3:.2f} ms, {100 * moved * rate / peak:.0f}%" for peak in PEAKS.values()]
            gigabytes = [f"{part / 1e9:.3f}" for part in (step.weights, step.kv, moved)]
            rows.append([str(context), step.name, str(step.passes), *gigabytes, *shares])
    peaks = ", ".join(f"{name} {peak / 1e12:.2f} TB/s" for name, peak in PEAKS.items())
    return "\n".join(
        [
            "Estimates, nothing measured: bytes that one decode step of one request must read (Ouro-1.4B, bfloat16, "
            f"R = {model.loops}, window {window};",
            f"without logits, activations and writes), the time this takes at the published peak ({peaks},",
            "data sheets of NVIDIA H100 SXM and AMD Instinct MI300X), and the share of that peak which "
            f"{rate:g} steps per second would use.",
            _table(["context", "step", "passes", "weights GB", "KV GB", "all GB", *PEAKS], rows),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is compiled as it comes, a summary, and the estimates; 1 if a kernel does not fit."""
    parser = argparse.ArgumentParser(prog="python -m ouro_vllm.kernels.report", description=__doc__)
    for name, choices in (("targets", TARGETS), ("kernels", KERNELS), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 8192, 65536])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rate", type=float, default=100.0, help="decode steps per second for the share of the peak")
    options = parser.parse_args(arguments)

    line = "{:9} {:58} {:6} {:>9} {:>7} {:>7} {:>7} {}"
    print(line.format("kernel", "configuration", "target", "registers", "spilled", "shared", "limit", ""))
    found = []
    for usage in usages(options.targets, options.kernels, options.dtypes, options.head_sizes, options.jobs):
        print(line.format(*astuple(usage), _verdict(usage)), flush=True)
        found.append(usage)
    summary = []
    for target in options.targets:
        of = [usage for usage in found if usage.target == target]
        misfits, shared = sum(not usage.fits for usage in of), max((usage.shared for usage in of), default=0)
        summary.append([target, *map(str, (len(of), misfits, shared, SHARED_LIMIT[target]))])
    print("\n" + _table(["target", "compiled", "misfits", "most shared", "limit"], summary))
    bad = sum(not usage.fits for usage in found)
    print(f"\n{len(found)} compiled, {bad} with spills or too much shared memory.\n")
    print(estimates(OURO_1_4B, options.contexts, options.window, options.rate))
    return 1 if bad else 0


def _verdict(usage: Usage) -> str:
    if usage.spilled:
        return "SPILLS"
    return "" if usage.fits else "TOO LARGE"


if __name__ == "__main__":
    sys.exit(main())
