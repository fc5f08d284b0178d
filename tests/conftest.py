"""What the tests share: the bundled checkpoint, real prompts, and engines that run inside the test process.

An engine in the same process starts in seconds (no further process has to import vLLM). What only shows with vLLM's own
process layout is tested on a real server, which is started once for all tests that ask for it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from hypothesis import settings

from ouro_vllm.names import PLUGIN, SPECULATIVE_CONFIG

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "ouro-tiny"
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
MODEL = "ouro-tiny"  # what the server calls it
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

# Kernels run under Triton's interpreter, which holds for a whole process: test_kernels.py starts one for them.
collect_ignore_glob = [] if "OURO_KERNELS_ON" in os.environ else ["kernels/*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what needs no engine, then engines in this process, then servers."""
    order = {
        "test_server": 2,
        "test_anytime_server": 2,
        "test_exactness": 1,
        "test_shapes": 1,
        "test_speculation": 1,
        "test_sampling": 1,
        "test_depth": 1,
        "test_sharing": 1,
        "test_kernels": 1,
    }
    items.sort(key=lambda item: order.get(Path(item.fspath).stem, 0))


@contextmanager
def running(folder: str | Path = CHECKPOINT, **options) -> Iterator:
    """An engine for the body: float32, no compilation, 1,024 tokens of context unless `options` say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "seed": 0, "disable_log_stats": True}
    # Several engines are up at once, each small.
    defaults["gpu_memory_utilization"] = 0.2
    llm = None
    try:
        llm = LLM(str(folder), **{**defaults, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engine() -> Callable:
    return running


@pytest.fixture(scope="session")
def reference():
    from reference import Reference

    return Reference(CHECKPOINT)


@pytest.fixture(scope="session")
def heldout() -> list[int]:
    """Token ids of text the checkpoint was not trained on, one long run of it."""
    from corpus import library
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = "".join(document.text for document in library() if document.held_out)
    return tokenizer.encode(text[:600_000]).ids


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    """Base address of a running server, the same for all tests; its log is shown when it does not come up."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment["VLLM_PLUGINS"] = PLUGIN  # with the anytime endpoints
    command = [str(Path(sys.executable).parent / "ouro-vllm"), "serve", str(CHECKPOINT), "--port", str(port)]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "4096", "--host", "127.0.0.1"]
    # The grammar would let a model of this size write white space for ever.
    command += ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]
    command += ["--speculative-config", SPECULATIVE_CONFIG]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{address}/health"), 600, lambda: process.poll() is None, log)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def until(true, seconds: float, alive=lambda: True, log: Path | None = None) -> None:
    """Wait for `true()`; fail when `alive()` no longer holds or the time is over, with the end of the log."""
    deadline = time.monotonic() + seconds
    while not true():
        if not alive() or time.monotonic() > deadline:
            pytest.fail(log.read_text()[-4000:] if log else "the condition did not come about")
        time.sleep(0.2)
