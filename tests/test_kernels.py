"""The Triton kernels: their tests in a process with the interpreter on (and one on the GPU), and the compile report."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from ouro_vllm.kernels import report


def run_kernel_tests(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "kernels")]
    result = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_in_the_interpreter() -> None:
    run_kernel_tests(OURO_KERNELS_ON="cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_on_the_gpu() -> None:
    run_kernel_tests(OURO_KERNELS_ON="cuda", TRITON_INTERPRET="0")


def test_report_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    """A small part of the report's table, in two processes: figures of each kernel for each target, no spills."""
    assert report.main(["--dtypes", "bfloat16", "--head-sizes", "64", "--jobs", "2"]) == 0
    text = capsys.readouterr().out
    for target, kernel in itertools.product(report.TARGETS, ("attend", "combine", "kv_write", "kv_fold")):
        lines = [line.split() for line in text.splitlines() if line.startswith(kernel)]
        found = [line[-4:] for line in lines if line[-5] == target]
        assert found and all(int(registers) > 0 and int(spilled) == 0 for registers, spilled, *_ in found)
    assert "0 with spills or too much shared memory" in text


def test_report_has_each_case_once() -> None:
    """A cache of eight bits is written from three types, and folded from none; each with and without grouped heads."""
    found = list(report.usages(["sm_80"], ["kv_write", "kv_fold"], ["fp8"], [64]))
    assert [usage.kernel for usage in found] == ["kv_write"] * 6 + ["kv_fold"] * 2
    assert len({usage.configuration for usage in found}) == 8


def test_report_fails_on_spills_and_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spilling = report.Usage("attend", "x", "sm_80", 255, 8, 1000, 2000)
    large = report.Usage("attend", "y", "sm_80", 64, 0, 2001, 2000)
    monkeypatch.setattr(report, "usages", lambda *_: iter([spilling, large]))
    assert report.main([]) == 1
    text = capsys.readouterr().out
    assert "SPILLS" in text and "TOO LARGE" in text and "2 with spills" in text


def test_bytes_of_a_decode_step() -> None:
    """Ouro-1.4B's KV is 0.786 MB per token over all loops (arXiv 2605.07721), 1.2 billion looped parameters."""
    assert report.OURO_1_4B.kv_bytes(2) * 4 == pytest.approx(0.786e6, rel=1e-3)
    assert report.OURO_1_4B.stack_bytes(2) == pytest.approx(2.47e9, rel=1e-2)
    plain, plain_shared, wave, shared = report.steps(report.OURO_1_4B, context=8192, window=256)
    assert plain.kv == plain_shared.kv == wave.kv == 4 * 8192 * report.OURO_1_4B.kv_bytes(2)
    assert plain.weights == 4 * wave.weights
    assert shared.kv == (8192 + 3 * 256) * report.OURO_1_4B.kv_bytes(2)


def test_backend_has_a_name() -> None:
    """`--attention-backend CUSTOM` is ours once the plugin is loaded, and on the CPU nothing changes by itself."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from ouro_vllm import register
    from ouro_vllm.attention import own_backend
    from ouro_vllm.kernels.backend import LoopAttentionBackend

    register()
    assert AttentionBackendEnum.CUSTOM.get_class() is LoopAttentionBackend
    if not torch.cuda.is_available():
        assert own_backend(None, shares=True) is None
