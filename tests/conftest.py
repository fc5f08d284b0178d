"""What the tests share: the bundled checkpoint, real prompts, and engines that run inside the test process.

An engine in the same process starts in seconds (no further process has to import vLLM). What only shows with vLLM's own
process layout is tested on a real server, in test_server.py.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "examples" / "ouro-tiny"
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

# Kernels run under Triton's interpreter, which holds for a whole process: test_kernels.py starts one for them.
collect_ignore_glob = [] if "OURO_KERNELS_ON" in os.environ else ["kernels/*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: what needs no engine, then engines in this process, then servers."""
    order = {
        "test_server": 2,
        "test_exactness": 1,
        "test_shapes": 1,
        "test_speculation": 1,
        "test_sampling": 1,
        "test_depth": 1,
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
