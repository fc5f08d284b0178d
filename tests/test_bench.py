"""`ouro-vllm bench` against servers in miniature: what it asks, writes and refuses. No engine is started."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from test_cli import FAKE_SERVER

from ouro_vllm import bench, cli
from ouro_vllm.server import Server, ServerError, free_port


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes bench start FAKE_SERVER in the given mode in place of vLLM. The checkpoint is a folder with prompts."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_SERVER)
    (tmp_path / "prompts.json").write_text(json.dumps(["Once", "Twice"]))

    def use(mode: str) -> Path:
        def command(_model: str, arguments: list[str]) -> list[str]:
            return [sys.executable, str(script), arguments[arguments.index("--port") + 1], mode]

        monkeypatch.setattr(bench, "serve_command", command)
        return tmp_path

    return use


def test_bench_measures_every_mode_and_batch_and_writes_the_table(fake, tmp_path, capsys):
    readme, figures = tmp_path / "README.md", tmp_path / "new" / "figures.json"
    readme.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    arguments = ["bench", str(fake("good")), "--batch", "1,3", "--rounds", "2", "--tokens", "2"]
    assert cli.main([*arguments, "--json", str(figures), "--readme", str(readme)]) == 0
    written = json.loads(figures.read_text())
    for mode in bench.MODES:
        assert {size: len(rates) for size, rates in written["tokens_per_second"][mode].items()} == {"1": 2, "3": 2}
        assert all(rate > 0 for rates in written["tokens_per_second"][mode].values() for rate in rates)
        assert set(written["seconds_to_first_answer"][mode]) == {"cold", "warm"}
    page = readme.read_text()
    assert page.startswith(f"before\n{bench.BEGIN}\n") and page.endswith(f"{bench.END}\nafter\n")
    assert "old" not in page
    table = page[page.index("| mode") : page.index(bench.END)]
    assert table in capsys.readouterr().out
    assert table.count("\n| compiled |") == 3


def test_ratios_are_of_medians_to_the_first_mode():
    rates = {"eager": {8: [10.0, 20.0, 90.0]}, "compiled": {8: [30.0, 50.0, 40.0]}}
    starts = {mode: {"cold": 3.0, "warm": 2.0} for mode in rates}
    figures = {"model": "m", "tokens": 4, "rounds": 3, "seconds_to_first_answer": starts, "tokens_per_second": rates}
    text = bench.report(figures)
    assert "| eager | 8 | 20.0 (10.0 to 90.0) | 1.00 |" in text
    assert "| compiled | 8 | 40.0 (30.0 to 50.0) | 2.00 |" in text


@pytest.mark.parametrize(("mode", "named"), [("dies", "no weights to be found"), ("reports", "the engine is dead")])
def test_a_server_that_fails_is_reported_with_its_log(fake, mode, named, capsys):
    assert cli.main(["bench", str(fake(mode))]) == 1
    assert named in capsys.readouterr().err


def test_missing_prompts_and_marks_are_named(tmp_path, capsys):
    assert cli.main(["bench", str(tmp_path)]) == 1
    assert "prompts.json is not there: name a JSON list of prompts with --prompts FILE" in capsys.readouterr().err
    (tmp_path / "prompts.json").write_text("[]")
    (tmp_path / "README.md").write_text("nothing")
    assert cli.main(["bench", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 1
    assert bench.BEGIN in capsys.readouterr().err


def test_a_paused_server_stands_still_and_goes_on(tmp_path):
    script, port = tmp_path / "fake.py", free_port()
    script.write_text(FAKE_SERVER)
    server = Server([sys.executable, str(script), str(port), "good"], port, tmp_path / "log")
    server.start()
    try:
        server.wait_healthy(60, poll=0.05)
        with server.paused():
            stopped = os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
            assert stopped.si_status == signal.SIGSTOP
        server.wait_healthy(60, poll=0.05)
    finally:
        assert server.stop(30) in (0, -signal.SIGINT)


@pytest.mark.parametrize("text", ["", "0", "1,-2", "two"])
def test_batch_sizes_must_be_positive_numbers(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--batch", text])
    assert "--batch" in capsys.readouterr().err


def test_an_error_of_one_mode_stops_the_servers_of_all(fake, monkeypatch):
    stopped = []
    monkeypatch.setattr(bench, "throughput", lambda *_: (_ for _ in ()).throw(ServerError("gone")))
    monkeypatch.setattr(Server, "stop", lambda self, *_: stopped.append(self.port) or _kill(self))
    assert cli.main(["bench", str(fake("good"))]) == 1
    assert len(set(stopped)) == 2 * len(bench.MODES)


def _kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()
