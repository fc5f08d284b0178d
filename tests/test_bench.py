"""`ouro-vllm bench` with children in miniature: what it asks, counts, writes and refuses. No engine is started."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from ouro_vllm import cli, cpu
from ouro_vllm.bench import children, figures, modes, report, run, worker
from ouro_vllm.bench.children import Child
from ouro_vllm.bench.figures import Measurement
from ouro_vllm.wavefront.pacing import StepReport
from ouro_vllm.wavefront.waves import Counts

# A worker in miniature. argv: how it behaves, and a folder into which it writes what it was asked. It decodes twice as
# fast where it drafts, and its third answer then differs at token 1.
FAKE_WORKER = r"""
import json, os, signal, sys, time

behaviour, folder = sys.argv[1:]
print("the fake worker is here", file=sys.stderr, flush=True)
mode = ""
log = open(os.path.join(folder, "asked", str(os.getpid())), "w")
for line in sys.stdin:
    log.write(line)
    log.flush()
    question = json.loads(line)
    if "start" in question:
        options = question["start"]["options"]
        drafts = "speculative_config" in options
        started = len(os.listdir(os.path.join(folder, "asked")))  # this one and those of earlier starts among them
        if drafts and (behaviour == "dies" or (behaviour == "dies later" and started > 2)):
            sys.exit("no weights to be found")
        answer = {"loops": 4, "prompt_tokens": [3, 5], "kv_gib": 1.0, "start_seconds": 2.0}
        answer |= {"device": "cpu", "threads": 2, "vllm": "0", "torch": "0"}
    elif behaviour == "reports" and drafts:
        answer = {"error": "the engine is dead"}
    elif behaviour == "babbles":
        answer = None
        print("Loading ...", flush=True)
    elif behaviour == "is interrupted":
        os.kill(os.getppid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    else:
        number = question["measure"]["requests"]
        tokens = 10 * number
        one = {"seconds": tokens / (200 if drafts else 100), "requests": number, "tokens": tokens, "first_token": 0.25}
        passes = 2 if drafts else 4
        one |= {"passes": passes * tokens, "rows": 5 * tokens, "lane_passes": passes * tokens, "committed": tokens}
        one |= {"pass_seconds": one["seconds"] / 2}
        if behaviour == "slows down":
            one["first_token"] = started
        if drafts:
            one |= {"agreed": [7, 9, 9, 10], "judged": [10] * 4, "entries": {"1": 3}, "restarts": tokens // 10}
        outputs = [[i, i, i] for i in range(number)]
        if drafts:
            outputs[2][1] = -1
        answer = {"measurement": one, "outputs": outputs}
    if answer is not None:
        print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes bench start FAKE_WORKER with the given behaviour. Returns the folder of a checkpoint with prompts."""
    (tmp_path / "fake.py").write_text(FAKE_WORKER)
    (tmp_path / "asked").mkdir()
    (tmp_path / "prompts.json").write_text(json.dumps(["Once", "Twice"]))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.2)

    def use(behaviour: str) -> str:
        monkeypatch.setattr(run, "WORKER", [sys.executable, str(tmp_path / "fake.py"), behaviour, str(tmp_path)])
        return str(tmp_path)

    return use


def asked(folder: str) -> list[list[dict]]:
    """What each fake worker was asked, in the order in which they were started."""
    logs = sorted(Path(folder, "asked").iterdir(), key=lambda log: int(log.name))
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def gone(folder: str) -> bool:
    """Whether all fake workers have ended."""
    pids = [int(log.name) for log in Path(folder, "asked").iterdir()]
    return bool(pids) and not any(map(state, pids))


# The whole command.


def test_bench_measures_every_mode_and_batch_and_writes_what_it_found(fake, tmp_path, capsys):
    folder, readme, saved = fake("good"), tmp_path / "README.md", tmp_path / "new" / "figures.json"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    arguments = ["bench", "--model", folder, "--batch", "4,1", "--rounds", "2", "--tokens", "10", "--turns", "3"]
    arguments += ["--modes", "wavefront,plain", "--sampled", "--json", str(saved), "--readme", str(readme)]
    assert cli.main(arguments) == 0
    written = json.loads(saved.read_text())
    assert written["requests"] == {"1": 6, "4": 12}
    for series in ("greedy", "sampled"):
        for mode in ("plain", "wavefront"):
            assert list(written["series"][series][mode]) == ["1", "4"]
            assert all(len(cell["rounds"]) == 2 for cell in written["series"][series][mode].values())
    found = written["series"]["greedy"]["wavefront"]["4"]["summary"]
    assert found["ratio"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert found["tokens_per_second"]["median"] == 200
    assert found["passes_per_token"] == 2 and found["rows_per_token"] == 5 and found["rows_per_pass"] == 2.5
    assert found["agreement"] == [0.7, 0.9, 0.9, 1.0] and found["entry"] == "1"
    assert found["outside_passes"] == 0.5
    assert found["first_token_seconds"]["median"] == 0.25
    assert found["identical"] == pytest.approx(11 / 12) and found["first_difference"]["median"] == 1
    assert found["projected_ratio"] == 2.0
    assert written["series"]["greedy"]["plain"]["4"]["summary"]["identical"] == 1
    assert "projection, not a measurement" in written["projection"]["what"]
    page = readme.read_text()
    assert page.startswith("before\n<!-- bench -->\n") and page.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in page
    row = (
        "| wavefront | 4 | 200.0 (200.0 to 200.0) | 2.00 (2.00 to 2.00) |  | 250 | 2.00 | 5.00 | 1.00 | 92% | *2.00* |"
    )
    assert row in page and row in capsys.readouterr().out
    assert gone(folder)


def test_modes_are_asked_in_turn_plain_first_after_all_have_started(fake, capsys):
    folder = fake("good")
    assert cli.main(["bench", folder, "--batch", "2", "--rounds", "2", "--modes", "draft-verify,plain"]) == 0
    assert "as soon as one is done, 8 in all at batch 2, of 128 tokens" in capsys.readouterr().out
    textbook, plain = asked(folder)
    assert [list(question) for question in plain] == [["start"]] + [["measure"]] * 3
    question = {"batch": 2, "requests": 8, "temperature": 0.0, "parts": run.PARTS}
    assert textbook[1:] == plain[1:] == [{"measure": question}] * 3
    assert plain[0]["start"]["options"] == {}
    start = textbook[0]["start"]
    assert start["options"]["speculative_config"]["num_speculative_tokens"] == 3
    assert start["options"]["additional_config"] == {"ouro": {"speculation": "draft-verify"}}
    assert start["prompts"] == ["Once", "Twice"] and start["dtype"] == "bfloat16"
    assert {name: value for name, value in start.items() if name != "options"} == {
        name: value for name, value in plain[0]["start"].items() if name != "options"
    }


def test_a_mode_may_ask_for_something_of_its_own(fake):
    folder = fake("good")
    assert cli.main(["bench", folder, "--batch", "2", "--rounds", "1", "--modes", "plain,wavefront-off"]) == 0
    plain, off = sorted(asked(folder), key=lambda questions: "speculative_config" in questions[0]["start"]["options"])
    question = {"batch": 2, "requests": 8, "temperature": 0.0, "parts": run.PARTS}
    assert plain[1:] == [{"measure": question}] * 2
    assert off[1:] == [{"measure": {**question, "extra_args": {"ouro_speculate": 0}}}] * 2


@pytest.fixture
def stops(monkeypatch, tmp_path) -> list[bool]:
    """Per call of `stop_all`, whether all fake workers had ended behind it."""
    found = []

    def stop(given, grace):
        children.stop_all(given, grace)
        found.append(gone(tmp_path))

    monkeypatch.setattr(run, "stop_all", stop)
    return found


def test_engines_are_started_anew_and_all_rounds_count(fake, stops, tmp_path, capsys):
    folder, saved = fake("slows down"), tmp_path / "figures.json"
    arguments = ["--batch", "1,2", "--rounds", "2", "--starts", "3", "--modes", "plain,wavefront", "--json", str(saved)]
    assert cli.main(["bench", folder, "--sampled", *arguments]) == 0
    said = [[next(iter(question)) for question in child] for child in asked(folder)]
    assert said == [["start"] + ["measure"] * 12] * 6  # two modes, three starts
    assert stops == [True] * 3
    written = json.loads(saved.read_text())
    for series in ("greedy", "sampled"):
        for batch in ("1", "2"):
            rounds = {mode: cells[batch]["rounds"] for mode, cells in written["series"][series].items()}
            assert [one["first_token"] for one in rounds["plain"]] == [1, 1, 3, 3, 5, 5]
            assert [one["first_token"] for one in rounds["wavefront"]] == [2, 2, 4, 4, 6, 6]
    assert "Rounds: 2 after each of 3 starts of the engines, each in about" in capsys.readouterr().out


def test_a_later_start_that_fails_leaves_what_was_measured(fake, stops, tmp_path, capsys):
    folder, saved = fake("dies later"), tmp_path / "figures.json"
    arguments = ["--batch", "1", "--rounds", "2", "--starts", "3", "--modes", "plain,wavefront", "--json", str(saved)]
    assert cli.main(["bench", folder, *arguments]) == 1
    assert "wavefront: the engine's process died" in capsys.readouterr().err
    assert stops == [True] * 2
    written = json.loads(saved.read_text())
    assert written["starts"] == 1 and len(written["series"]["greedy"]["plain"]["1"]["rounds"]) == 2


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moment", ["hint", "stop"])
def test_an_interrupt_while_children_are_stopped_ends_all_at_once_and_is_passed_on(moment, interrupt):
    did = []

    class Reluctant(Child):
        def __init__(self, name):
            self.name = name

        def hint(self):
            self.note("hint", None)

        def stop(self, grace):
            self.note("stop", grace)

        def note(self, what, grace):
            did.append((self.name, what, grace))
            if (self.name, what) == ("a", moment):
                raise interrupt

    with pytest.raises(interrupt):
        children.stop_all([Reluctant("a"), Reluctant("b")], 9.0)
    first = 9.0 if moment == "stop" else 0
    assert did == [("a", "hint", None), ("b", "hint", None), ("a", "stop", first), ("b", "stop", 0)]


def test_as_many_requests_at_every_batch_size(fake):
    folder = fake("good")
    assert cli.main(["bench", folder, "--batch", "1,4,16", "--rounds", "1", "--modes", "plain", "--requests", "9"]) == 0
    (plain,) = asked(folder)
    assert [question["measure"]["requests"] for question in plain[1:]] == [9] * 4 + [16] * 2


def test_an_earlier_run_is_reported_anew(fake, tmp_path, capsys):
    saved, readme = tmp_path / "figures.json", tmp_path / "README.md"
    assert cli.main(["bench", fake("good"), "--batch", "2,8", "--modes", "plain,wavefront", "--json", str(saved)]) == 0
    readme.write_text("<!-- big -->\n<!-- /big -->\n")
    capsys.readouterr()
    arguments = ["--from", str(saved), "--flat-rows", "4", "--readme", str(readme), "--mark", "big"]
    assert cli.main(["bench", *arguments]) == 0
    # Batch 2: 5 rows cost 5 / 4 against 1. Batch 8: 20 rows cost 5 against 2.
    assert "| *1.60* |" in readme.read_text() and "| *0.80* |" in readme.read_text()
    assert "flat to 4 rows" in capsys.readouterr().out
    for strange in ('{"model": "m"}', '{"series": 5}', "[]"):
        saved.write_text(strange)
        assert cli.main(["bench", "--from", str(saved)]) == 1
        assert "not figures of this version" in capsys.readouterr().err
    assert cli.main(["bench", "--from", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("dies", "wavefront: the engine's process died.*no weights to be found"),
        ("reports", "wavefront: the engine is dead"),
        ("babbles", "plain: no answer but 'Loading ...'"),
    ],
)
def test_a_child_that_fails_is_reported_and_all_are_stopped(fake, behaviour, said, capsys):
    folder = fake(behaviour)
    assert cli.main(["bench", folder, "--modes", "plain,wavefront"]) == 1
    assert re.search(said, capsys.readouterr().err, flags=re.DOTALL)
    assert len(asked(folder)) == 2 and gone(folder)


def test_children_are_stopped_on_sigterm(fake):
    folder, before = fake("is interrupted"), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", folder, "--modes", "plain,wavefront"])
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert gone(folder)


def test_a_child_that_waits_ends_when_its_parent_is_killed(fake, tmp_path):
    folder = fake("good")
    code = "import sys, time; from pathlib import Path; from ouro_vllm.bench.children import Child\n"
    code += "Child('m', sys.argv[1:], {}, Path('/dev/null')); print(flush=True); time.sleep(3600)"
    parent = subprocess.Popen([sys.executable, "-c", code, *run.WORKER], stdout=subprocess.PIPE)
    parent.stdout.readline()
    wait_for(lambda: list(tmp_path.glob("asked/*")))
    parent.kill()
    parent.communicate()
    wait_for(lambda: gone(folder))


STOPPABLE = r"""
from types import SimpleNamespace
from ouro_vllm.bench import worker
worker.Engine = lambda: SimpleNamespace(facts={"ready": True}, measure=lambda: (yield {"measured": True}))
worker.main()
"""


def state(child: int) -> str:
    """The letter for a process's state, as in ps; nothing once it has ended."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "")
    except FileNotFoundError:
        return ""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="children are stopped on Linux only")
def test_a_child_that_is_not_asked_stands_still_and_goes_on(tmp_path):
    child = Child("m", [sys.executable, "-c", STOPPABLE], os.environ, tmp_path / "log")
    try:
        assert child.ask({"start": {}}) == {"ready": True}
        wait_for(lambda: state(child.process.pid) == "T")
        assert child.ask({"measure": {}}) == {"measured": True}
    finally:
        child.stop(30)
    assert child.process.returncode in (0, 1)  # 1: the stand-in has nothing to shut down


@pytest.mark.skipif(sys.platform != "linux", reason="children are stopped on Linux only")
def test_a_stopped_child_ends_when_its_parent_is_killed():
    code = "import os, sys, time; from pathlib import Path; from ouro_vllm.bench.children import Child\n"
    code += "child = Child('m', sys.argv[1:], os.environ, Path('/dev/null')); child.ask({'start': {}})\n"
    code += "print(child.process.pid, flush=True); time.sleep(3600)"
    command = [sys.executable, "-c", code, sys.executable, "-c", STOPPABLE]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    wait_for(lambda: state(child) == "T")
    parent.kill()
    parent.communicate()
    wait_for(lambda: not state(child))


# What is refused before anything is started.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", ""], "argument --batch: '' is no whole number from 1 on"),
        (["--batch", "0"], "argument --batch: '0' is no"),
        (["--batch", "1,-2"], "argument --batch: '-2' is no"),
        (["--batch", "two"], "argument --batch: 'two' is no"),
        (["--rounds", "0"], "argument --rounds: '0' is no"),
        (["--modes", "plain,eager"], "argument --modes: unknown mode 'eager': there are plain, draft-verify"),
        (["--modes", "wavefront"], "argument --modes: plain is missing"),
        (["--dtype", "int8"], "argument --dtype"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert said in capsys.readouterr().err


def test_missing_input_is_named(fake, tmp_path, monkeypatch, capsys):
    folder = fake("good")

    def refused(*arguments: str) -> str:
        assert cli.main(["bench", *arguments]) == 1
        return capsys.readouterr().err

    assert "Name the model once" in refused(folder, "--model", folder)
    assert "holds no config.json" in refused(str(tmp_path / "nowhere"))
    assert "none is not there: name a JSON list" in refused(folder, "--prompts", str(tmp_path / "none"))
    assert "prompts.json is not there" in refused("owner/name")
    for content, said in (
        ("[", "is not JSON"),
        ("[]", "at least one"),
        ("[1]", "list of texts"),
        ('[""]', "none empty"),
    ):
        (tmp_path / "odd.json").write_text(content)
        assert said in refused(folder, "--prompts", str(tmp_path / "odd.json"))
    assert "README.md is not there" in refused(folder, "--readme", str(tmp_path / "README.md"))
    (tmp_path / "README.md").write_text("<!-- bench -->")
    assert "lacks `<!-- bench -->` or `<!-- /bench -->`" in refused(folder, "--readme", str(tmp_path / "README.md"))
    assert "--passes 129: vLLM takes no more than 128" in refused(folder, "--passes", "129")
    assert "cannot be written" in refused(folder, "--json", str(tmp_path / "fake.py" / "x.json"))
    assert "cannot be written: name a file" in refused(folder, "--json", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--png needs matplotlib, the extra `bench`" in refused(folder, "--png", "x.png")
    assert not asked(folder)


def test_a_worker_that_cannot_be_run(fake, monkeypatch, capsys):
    folder = fake("good")
    monkeypatch.setattr(run, "WORKER", [str(ROOT / "nowhere")])
    assert cli.main(["bench", folder]) == 1
    assert "plain: " in capsys.readouterr().err


# Figures.


def measured(**given) -> Measurement:
    return Measurement(**{"seconds": 1.0, "requests": 1, "tokens": 10, "first_token": 0.1, "committed": 10, **given})


def test_ratios_are_of_rounds_and_counts_are_summed_over_them():
    counts = {"compared": 1, "identical": 1, "passes": 20, "lane_passes": 20, "rows": 40}
    base = [measured(seconds=seconds, **counts) for seconds in (1.0, 2.0, 10.0)]
    rounds = [measured(seconds=seconds, **counts) for seconds in (0.5, 2.0, 2.0)]
    rounds[0].lane_passes, rounds[0].rows, rounds[0].passes = 5, 10, 5
    found = figures.summary(rounds, base, loops=4, batch=1, flat=8)
    assert found["tokens_per_second"] == {"median": 5, "least": 5, "most": 20}
    assert found["ratio"] == {"median": 2.0, "least": 1.0, "most": 5.0}
    assert found["passes_per_token"] == pytest.approx(45 / 30)
    assert found["share_of_bound"] == pytest.approx(2.0 * 1.5 / 4)
    assert found["rows_per_token"] == pytest.approx(3.0)
    assert found["rows_per_pass"] == pytest.approx(2.0)
    assert found["outside_passes"] is None and found["entry"] is None and found["first_difference"] is None
    assert found["agreement"] == []


def test_sums_of_lists_and_of_entries():
    one = measured(agreed=[1, 2], judged=[2, 2], entries={"1": 2}, pass_seconds=0.25, differ_at=[4])
    other = measured(agreed=[0, 2, 3], judged=[0, 4, 3], entries={"1": 1, "2": 5}, pass_seconds=0.5, differ_at=[2, 9])
    sums = figures.summed([one, other])
    assert sums["agreed"] == [1, 4, 3] and sums["judged"] == [2, 6, 3]
    assert sums["entries"] == {"1": 3, "2": 5}
    assert sums["differ_at"] == [4, 2, 9]
    assert sums["pass_seconds"] == 0.75 and sums["tokens"] == 20


@pytest.mark.parametrize(
    ("passes", "rows", "batch", "flat", "expected"),
    [
        (4.0, 1.0, 32, 64, 1.0),  # plain itself
        (1.6, 2.5, 8, 64, 2.5),  # all passes cost the same: R / passes per token
        (1.6, 2.5, 8, 10, 1.25),  # 20 rows cost twice as much, plain's 8 do not
        (1.6, 2.5, 100, 10, 1.0),  # bound by rows: 4 of plain against 1.6 * 2.5
    ],
)
def test_projection(passes, rows, batch, flat, expected):
    assert figures.projected_ratio(4, passes, rows, batch, flat) == pytest.approx(expected)


def test_outputs_are_compared_as_far_as_both_go():
    assert figures.first_difference([1, 2], [1, 2]) is None
    assert figures.first_difference([1, 2], [1, 3]) == 1
    assert figures.first_difference([1, 2], [1, 2, 3]) == 2
    one = measured()
    one.compare([[1], [2], [3]], [[1], [4]])
    assert (one.compared, one.identical, one.differ_at) == (2, 1, [0])


# Tables and the plot.


def example(sampled: bool = True) -> dict:
    """Figures of a made-up run."""
    gathered = {"model": "m", "dtype": "bfloat16", "loops": 4, "starts": 1, "rounds": 1, "parts": 8, "tokens": 10}
    gathered |= {"requests": {"1": 6, "8": 32}}
    gathered |= {"device": "cpu", "threads": 2, "vllm": "0", "series": {}}
    for series in ("greedy", "sampled") if sampled else ("greedy",):
        gathered["series"][series] = {}
        for speed, mode in enumerate(modes.MODES, 1):
            gathered["series"][series][mode] = {}
            for batch in (1, 8):
                one = measured(
                    seconds=1 / speed, compared=2, identical=1, differ_at=[3], passes=9, rows=50, lane_passes=20
                )
                if modes.speculative(mode):
                    one.agreed, one.judged, one.entries = [1, 1, 2, 2], [2, 2, 2, 2], {"2": 4, "1": 1}
                gathered["series"][series][mode][str(batch)] = {"rounds": [figures.as_json(one)]}
    run.summarise(gathered, 64)
    return gathered


def test_tables():
    text = report.text(example())
    row = "| wavefront | 8 | 30.0 (30.0 to 30.0) | 3.00 (3.00 to 3.00) |  | 100 | 2.00 | 5.00 | 1.50 | 50% | *2.00* |"
    assert text.count(row) == 2
    assert "Agreement of depths 1, 2, 3 with 4 (greedy, wavefront-full, batch 1): 0.50, 0.50, 1.00." in text
    assert "projection, not a measurement" in text and "temperature 0.7:" in text
    assert "temperature 0.7" not in report.for_readme(example(sampled=False))
    assert "6 in all at batch 1 and 32 at batch 8, of 10 tokens" in text
    for table in (report.overview(example(), "greedy"), report.details(example(), "greedy")):
        assert {len(row) for row in table} == {len(table[0])}
        assert len(table) == 1 + 2 * len(modes.MODES)


def test_a_table_of_a_run_that_was_cut_short_names_what_it_holds():
    planned = example()
    planned["requests"]["64"] = 64
    assert "6 in all at batch 1 and 32 at batch 8, of 10 tokens" in report.text(planned)


@pytest.mark.parametrize("sampled", [False, True])
def test_plot(sampled, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(example(sampled), tmp_path / "curves")
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page"
    page.write_text("<!-- a -->\n1\n<!-- /a -->\n<!-- b -->\n2\n<!-- /b -->\n")
    report.into_readme(page, "a", r"\1 new")
    assert page.read_text() == "<!-- a -->\n\n\\1 new\n<!-- /a -->\n<!-- b -->\n2\n<!-- /b -->\n"


# Modes and children's settings.


def test_modes_as_options():
    assert modes.ASKED.keys() < modes.MODES.keys()
    for mode in modes.MODES:
        options = modes.engine_options(mode, passes=5, drafts=2, window=64)
        assert modes.speculative(mode) == ("speculative_config" in options)
    full = modes.engine_options("wavefront-full", passes=5, drafts=2, window=64)
    assert full["speculative_config"]["num_speculative_tokens"] == 5
    assert full["additional_config"] == {"ouro": {"entry_loop": 1}}
    assert modes.engine_options("plain-again", 5, 2, 64) == modes.engine_options("plain", 5, 2, 64) == {}
    assert modes.engine_options("plain-eager", 5, 2, 64) == {"enforce_eager": True}


def test_modes_that_share():
    assert modes.with_sharing(["plain", "wavefront"], ["per_loop", "last"]) == [
        "plain",
        "wavefront",
        "plain+last",
        "wavefront+last",
    ]
    shared = modes.engine_options("wavefront-full+average", 5, 2, 64)["additional_config"]["ouro"]
    assert shared == {"entry_loop": 1, "kv_sharing": "average", "kv_window": 64}
    assert modes.speculative("wavefront+last") and not modes.speculative("plain+last")
    assert modes.engine_options("plain+last", 5, 2, 64).keys() == {"additional_config"}


def test_worker_cuts_prompts_of_one_length():
    assert worker.recut([[1, 2], [3], [4, 5]], 4, 3) == [[1, 2, 3, 4], [5, 1, 2, 3], [4, 5, 1, 2]]


@pytest.mark.parametrize("tokens", [1, 2, 31, 128])
def test_answers_end_at_different_times(tokens):
    lengths = [worker.answer_length(tokens, number) for number in range(200)]
    assert 1 <= min(lengths) and tokens // 2 <= min(lengths) and max(lengths) <= tokens // 2 + tokens
    for some in (6, 16, 200):
        assert abs(sum(lengths[:some]) / some - tokens) < max(1, 0.1 * tokens)
    if tokens > 100:
        assert max(map(lengths.count, lengths)) < 6


def test_environment_of_children(monkeypatch):
    for name in ("OMP_NUM_THREADS", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    for module in (cpu, run):
        monkeypatch.setattr(module, "is_cpu_build", lambda: True)
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    env = run.child_environment()
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert cpu.KV_SPACE not in env
    assert int(env["OMP_NUM_THREADS"]) >= 1
    assert env["KMP_BLOCKTIME"] == "7"
    monkeypatch.setattr(cpu, "is_cpu_build", lambda: False)
    monkeypatch.setattr(run, "is_cpu_build", lambda: False)
    assert "OMP_NUM_THREADS" not in run.child_environment()


# The worker, without vLLM.


class FakeEngine:
    """As `LLMEngine` to `worker.answer`: two tokens per step and request of `places`, `params` tokens each."""

    def __init__(self, places: int) -> None:
        self.left: dict[str, deque[int]] = {}
        self.places, self.order = places, []

    def add_request(self, name: str, prompt: dict, params: int) -> None:
        self.left[name] = deque(prompt["prompt_token_ids"] * params)
        self.order.append(name)

    def abort_request(self, names: list[str]) -> None:
        self.aborted = {name: len(self.left.pop(name)) for name in names}

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[SimpleNamespace]:
        news = []
        for name, left in list(self.left.items())[: self.places]:
            new = [left.popleft() for _ in range(min(2, len(left)))]
            if not left:
                del self.left[name]
            news.append(SimpleNamespace(request_id=name, finished=not left, outputs=[SimpleNamespace(token_ids=new)]))
        return news


def test_worker_asks_for_all_and_stops_once_the_first_ones_are_answered():
    engine, times = FakeEngine(3), iter(range(1, 100))

    def stepped() -> float:
        return float(next(times))

    prompts, lengths = [[number] for number in range(20)], [1, 8, 3, 2, 5, 4, 1, *[3] * 13]
    so_far, answering = [], worker.answer(engine, "run-1", prompts, lengths, 7, 3, stepped, lambda: 0.0)
    while isinstance(tokens := worker.onward(answering), int):
        so_far.append(tokens)
    outputs, waits, decoding, seconds = tokens
    assert so_far == [5, 10, 16, 22] and sum(map(len, outputs)) == 26
    assert outputs[:7] == [[number] * length for number, length in enumerate(lengths[:7])]
    assert engine.order == [f"run-1-{number}" for number in range(20)]
    assert outputs[7:] == [[7, 7], *[[]] * 12]  # took a place that got free for good
    assert engine.aborted == {"run-1-7": 1, **{f"run-1-{number}": 3 for number in range(8, 20)}}
    assert waits == [1.0] * 7  # each had its first tokens in the step behind the one that left it a place
    assert decoding == [(length + 1) // 2 - 1 for length in lengths[:7]]  # two tokens come per step
    assert seconds == 5.0  # until the last one's tokens left the engine


def test_worker_counts_the_burst_behind_the_last_step_with_the_step_that_brings_its_tokens():
    engine = object.__new__(worker.Engine)
    engine.speculates = True
    engine.runner = SimpleNamespace(_waves=SimpleNamespace(counts=Counts(passes=8, rows=30, finished=6)))

    class Scheduler:
        totals = property(lambda self: StepReport(Counts(passes=4, rows=20, finished=5), committed=7))

    engine.core = SimpleNamespace(scheduler=Scheduler())
    after, before = engine._counted(), engine._counted(behind=True)
    assert [(sums["counts"]["passes"], sums["counts"]["rows"]) for sums in (after, before)] == [(4, 20), (12, 50)]
    assert after["committed"] == before["committed"] == 7


def test_worker_counts_between_two_sums():
    engine = object.__new__(worker.Engine)
    engine.speculates, engine.loops = True, 4
    early = {"counts": {name: 1 for name in worker.KEPT} | {"seconds": 0.5}, "committed": 2}
    late = {"counts": {name: 4 for name in worker.KEPT} | {"seconds": 0.75}, "committed": 9}
    for name in ("agreed", "judged", "settled"):
        early["counts"][name], late["counts"][name] = [], [3, 4]
    found = engine._between(early, late, tokens=7)
    assert found["passes"] == 3 and found["agreed"] == [3, 4]
    assert found["pass_seconds"] == 0.25 and found["committed"] == 7
    engine.speculates, engine.runner = False, SimpleNamespace(device=SimpleNamespace(type="cpu"))
    found = engine._between((3, 1.0), (8, 1.5), tokens=10)
    counts = {"passes": 20, "rows": 40, "lane_passes": 40, "committed": 10, "pass_seconds": 0.5}
    assert found == counts
    engine.runner.device.type = "cuda"
    assert engine._between((3, 1.0), (8, 1.5), tokens=10)["pass_seconds"] is None


def test_kv_blocks_for_the_longest_requests_at_once():
    assert worker.blocks_needed([1, 128, 129, 300], batch=2) == 3 + 2 + worker.SPARE_BLOCKS
    assert worker.blocks_needed([1, 128], batch=8) == 2 + worker.SPARE_BLOCKS


def test_kv_bytes_where_loops_share_one_pool():
    """Four groups over the same bytes, as vLLM lays them out for loops with block tables of their own."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

    tensors = [KVCacheTensor(size=24 * 3 * 512, layers=[f"{n}"], layer_stride=512, block_stride=512) for n in range(4)]
    cache = KVCacheConfig(num_blocks=24, kv_cache_tensors=tensors, kv_cache_groups=[])
    assert worker.block_bytes(cache) == 3 * 512


def test_worker_speaks_only_json_on_stdout_and_survives_errors(tmp_path):
    code = r"""
import os, sys
from types import SimpleNamespace
from ouro_vllm.bench import worker

class Engine:
    def __init__(self, model):
        print("noise")
        os.system("echo more noise")
        assert sys.stdin.read() == ""
        self.facts = {"model": model}
        core = SimpleNamespace(shutdown=lambda: print("shut down", file=sys.stderr))
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))

    def measure(self, batch):
        raise ValueError(f"no batch {batch}")

worker.Engine = Engine
worker.main()
"""
    with (tmp_path / "log").open("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        questions = [{"start": {"model": "m"}}, {"measure": {"batch": 3}}, {"start": {}}]
        said, _ = child.communicate("".join(json.dumps(question) + "\n" for question in questions), timeout=60)
        log.seek(0)
        logged = log.read()
    answers = [json.loads(line) for line in said.splitlines()]
    assert answers[:2] == [{"model": "m"}, {"error": "no batch 3"}]
    assert "model" in answers[2]["error"]
    assert child.returncode == 0
    assert "noise" in logged and "more noise" in logged and "shut down" in logged


def test_modes_take_turns_in_parts():
    """Whoever is asked first, modes are compared with plain's answers of the round, plain's own with its first ones."""
    asked, plan = [], SimpleNamespace(modes=["wavefront", "plain"], rounds=2, requests=lambda batch: 1)

    class Asked:
        """Answers in two parts, drafting in one."""

        def __init__(self, mode):
            self.mode, self.rounds, self.part = mode, 0, 0

        def ask(self, question):
            asked.append(self.mode)
            ((what, details),) = question.items()
            assert what == ("go_on" if self.part else "measure") and (self.part or details["parts"] == run.PARTS)
            self.part = (self.part + 1) % (3 if self.mode == "plain" else 2)
            if self.part:
                return {"tokens": 1}
            self.rounds += 1
            measurement = {"seconds": 1.0, "requests": 1, "tokens": 2, "first_token": 0.1, "pass_seconds": 0.5}
            measurement |= {"passes": 2, "rows": 2, "lane_passes": 2, "committed": 2}
            return {"measurement": measurement, "outputs": [[self.rounds]]}  # another one in each round

    rounds = run.alternate(plan, {mode: Asked(mode) for mode in plan.modes}, 1, 0.0, [])
    assert asked == ["plain", "wavefront", "plain", "wavefront", "plain"] * 3
    same = {mode: [one.identical for one in kept] for mode, kept in rounds.items()}
    assert same == {"plain": [0, 0], "wavefront": [1, 1]}


def test_a_measurement_in_parts_is_that_in_one_with_the_clock_stopped_between(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worker, "perf_counter", lambda: now[0])

    def stepped() -> float:
        now[0] += 1.0
        return engine.clock()

    def measured(parts: int) -> tuple:
        lengths = [8, 5, 6]
        steps = worker.answer(FakeEngine(2), "1", [[7]] * 3, lengths, 3, 2, stepped, engine.clock)
        answering, breaks = engine._in_parts(steps, sum(lengths) - 2, parts), 0
        while isinstance(found := worker.onward(answering), dict):
            breaks += 1
            now[0] += 100.0  # others have their turn
        return breaks, found

    engine = object.__new__(worker.Engine)
    engine.away = 0.0
    (none, whole), (three, parted) = measured(1), measured(4)  # more tokens come than were expected, as in full batches
    assert (none, three) == (0, 3) and parted == whole and whole[3] == 6.0
