"""Anytime on the real server: events against the plain endpoint, hang-ups, the terminal, the page, the examples."""

import asyncio
import http.client
import json
import os
import pty
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import browser
import pytest
import requests
from conftest import CHECKPOINT, MODEL, ROOT, until
from test_server import PROMPT, SUM, gauge

from ouro_vllm import anytime
from ouro_vllm.anytime import Answer, protocol

PROMPTS = [PROMPT, "class Reader:\n    def __init__(self, name):\n", "# é 語 🙂\nfor line in", "\n\n\nimport"]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 64, "ignore_eos": True}


def ask(server: str, body: dict) -> list[dict]:
    """All events."""
    path = "chat/completions" if "messages" in body else "completions"
    answer = requests.post(f"{server}/v1/anytime/{path}", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.endswith("data: [DONE]\n\n")
    return [event for line in answer.text.split("\n") if (event := protocol.decoded(line))]


def plain(server: str, body: dict) -> dict:
    """The ordinary endpoint's choice for the same body."""
    path = "chat/completions" if "messages" in body else "completions"
    body = {name: value for name, value in body.items() if name != "anytime"}
    answer = requests.post(f"{server}/v1/{path}", json=body | {"return_token_ids": True}, timeout=300).json()
    choice = answer["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {"text": text, "ids": choice["token_ids"], "reason": choice["finish_reason"], "usage": answer["usage"]}


def checked(events: list[dict], expected: dict) -> Answer:
    """The answer, after looking at every event on the way to it."""
    client = Answer()
    for event in events:
        assert client.done is None
        client.feed(event)
        assert expected["text"].startswith(client.committed)
        assert client.token_ids == expected["ids"][: len(client.token_ids)]
    assert (client.committed, client.token_ids) == (expected["text"], expected["ids"])
    assert client.done["finish_reason"] == expected["reason"] and client.tail_ids == []
    counts = {name: expected["usage"][name] for name in client.done["usage"]}
    assert client.done["usage"] == counts and client.done["committed"] == len(expected["ids"])
    return client


def idle(server: str) -> None:
    """Wait until nothing runs or waits and no KV cache is held."""
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        until(lambda name=name: gauge(server, f"vllm:{name}") == 0, 60)


def test_tails_settle_into_the_plain_answer(server):
    retracted = shown = 0
    for prompt in PROMPTS:
        body = {**GREEDY, "prompt": prompt}
        events = ask(server, body)
        client = checked(events, plain(server, body))
        assert events[0]["type"] == "provisional" and events[0]["depth"] == [1]
        assert client.depth == [4] * 64 and client.done["depth"] == 4
        assert all(0 <= depth <= 4 for event in events if event["type"] == "provisional" for depth in event["depth"])
        assert all(event["index"] + len(event["token_ids"]) <= 64 for event in events if "token_ids" in event)
        retracted += client.retracted
        shown += sum(len(event["token_ids"]) for event in events if event["type"] == "provisional")
    assert shown > 64 and 0 < retracted < shown / 2


def test_chat(server):
    body = {"model": MODEL, "messages": SUM, "temperature": 0, "max_tokens": 20}
    client = checked(ask(server, body), plain(server, body))
    assert client.done["finish_reason"] == "stop" and client.committed.strip() in list("01234")


def test_sampled_answers_are_those_of_the_seed(server):
    body = {**GREEDY, "prompt": PROMPT, "temperature": 1, "seed": 5, "top_p": 0.9}
    checked(ask(server, body), plain(server, body))


def test_stop_strings_and_lengths_hold_for_what_is_provisional_too(server):
    text = plain(server, {**GREEDY, "prompt": PROMPT})["text"]
    for stop in (text[20:23], text[-6:-2]):
        body = {**GREEDY, "prompt": PROMPT, "stop": [stop]}
        events = ask(server, body)
        client = Answer()
        for event in events:
            client.feed(event)
            assert stop not in client.committed + client.provisional
        checked(events, plain(server, body))
    for longest in (1, 2, 3, 9):
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": longest}
        checked(ask(server, body), plain(server, body))


def test_traces_are_the_references(server, reference):
    from tokenizers import Tokenizer

    body = {**GREEDY, "prompt": PROMPT, "anytime": {"trace": True}, "max_tokens": 40}
    client = checked(ask(server, body), plain(server, body))
    prompt = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(PROMPT).ids
    loops = reference.run(prompt + client.token_ids[:-1])
    assert sorted(client.traces) == list(range(40))
    for number, said in client.traces.items():
        assert [loop["depth"] for loop in said] == [1, 2, 3, 4]
        assert said[-1]["token_id"] == client.token_ids[number]
        for loop, wanted in zip(said, loops, strict=True):
            at = len(prompt) - 1 + number
            chances = wanted.logits[at].softmax(-1)
            assert loop["probability"] == pytest.approx(float(chances[loop["token_id"]]), abs=2e-3)
            assert loop["probability"] == pytest.approx(float(chances.max()), abs=2e-3)
            assert loop["lambda"] == pytest.approx(float(wanted.exit_logit[at].sigmoid()), abs=2e-3)


def test_depths_are_those_that_decided(server):
    body = {**GREEDY, "prompt": PROMPT, "vllm_xargs": {"ouro_loops": 2}}
    assert checked(ask(server, body), plain(server, body)).depth == [2] * 64
    body = {**GREEDY, "prompt": PROMPT, "vllm_xargs": {"ouro_exit_threshold": 0.5}, "anytime": {"trace": True}}
    client = checked(ask(server, body), plain(server, body))
    assert set(client.depth) <= {1, 2, 3, 4} and 1 < len(set(client.depth))
    assert client.done["depth"] == pytest.approx(sum(client.depth) / 64, abs=1e-3)
    for depth, token, said in zip(client.depth, client.token_ids, client.traces.values(), strict=True):
        assert [loop["depth"] for loop in said] == list(range(1, depth + 1)) and said[-1]["token_id"] == token
        staying = [1.0]
        for loop in said:
            staying.append(staying[-1] * (1 - loop["lambda"]))
        # It left where the chance of having left reached the threshold: to the digits of a trace.
        assert depth == 4 or 1 - staying[-1] >= 0.5 - 1e-3
        assert all(1 - before < 0.5 + 1e-3 for before in staying[:-1])


def test_without_drafting_there_are_commits_only(server):
    body = {**GREEDY, "prompt": PROMPT, "vllm_xargs": {"ouro_speculate": 0}}
    events = ask(server, body)
    checked(events, plain(server, body))
    assert {event["type"] for event in events} <= {"commit", "provisional", "done"}


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_progressive_shows_a_whole_draft_and_revises_it(server, prompt):
    body = {**GREEDY, "prompt": prompt, "anytime": {"mode": "progressive"}}
    events = ask(server, body)
    client = checked(events, plain(server, body))
    draft = plain(server, {**body, "vllm_xargs": {"ouro_loops": 1}})
    whole = next(n for n, event in enumerate(events) if event.get("complete"))
    assert {event["type"] for event in events[:whole]} <= {"provisional"}
    assert (events[whole]["text"], events[whole]["token_ids"]) == (draft["text"], draft["ids"])
    assert (client.retracted > 0) == (draft["ids"] != client.token_ids)


def test_progressive_sampled(server):
    body = {**GREEDY, "prompt": PROMPT, "temperature": 0.8, "seed": 9, "anytime": {"mode": "progressive"}}
    checked(ask(server, body), plain(server, body))
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "anytime": {"mode": "progressive"}}  # a seed is chosen
    assert ask(server, body)[-1]["committed"] <= 8


@pytest.mark.parametrize("mode", ["tail", "progressive"])
def test_a_deadline_ends_the_answer_and_the_request(server, mode):
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 3500, "anytime": {"mode": mode, "deadline_ms": 400}}
    began = time.monotonic()
    events = ask(server, body)
    assert time.monotonic() - began < 30  # 3500 tokens take longer; the rest is allowance for a busy machine
    client = anytime.reduce(events)
    assert client.done["finish_reason"] == "deadline" and client.done["committed"] < 3500
    assert client.done["provisional"] == len(client.tail_ids)
    idle(server)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 2}, "`n` is not for anytime endpoints"),
        ({"anytime": {"mode": "slow"}}, "`anytime.mode`"),
        ({"vllm_xargs": {"ouro_speculate": 7}}, "`ouro_speculate` is 7"),
        ({"prompt": [5, 999_999]}, "999999|out of vocabulary"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_bad_requests_are_a_400_that_names_the_field(server, change, named):
    answer = requests.post(f"{server}/v1/anytime/completions", json={**GREEDY, "prompt": PROMPT, **change}, timeout=60)
    assert answer.status_code == 400
    assert any(part in answer.json()["error"]["message"] for part in named.split("|")), answer.text
    assert (
        requests.post(f"{server}/v1/anytime/completions", json={"model": "x", "prompt": "y"}, timeout=60).status_code
        == 404
    )


def test_sixty_four_clients_that_hang_up_leave_nothing_behind(server):
    dice = random.Random(3)
    before = plain(server, {**GREEDY, "prompt": PROMPT})

    async def one(number: int, patience: int) -> Answer:
        mode = "progressive" if number % 4 == 0 else "tail"
        options = {"mode": mode, "trace": number % 3 == 0}
        body = {**GREEDY, "prompt": PROMPTS[number % 4], "max_tokens": 200, "anytime": options}
        client, stream = Answer(), anytime.events(f"{server}/v1", body)
        async for event in stream:
            client.feed(event)
            patience -= 1
            if not patience:
                break
        await stream.aclose()
        return client

    async def all_of_them() -> list[Answer]:
        patience = [dice.choice([1, 2, 5, 20, 10**6]) for _ in range(64)]
        return await asyncio.gather(*(one(number, count) for number, count in enumerate(patience)))

    answers = asyncio.run(all_of_them())
    finished = [answer for answer in answers if answer.done]
    assert 0 < len(finished) < 64 and all(len(answer.token_ids) == 200 for answer in finished)
    idle(server)
    assert plain(server, {**GREEDY, "prompt": PROMPT}) == before
    until(lambda: gauge(server, "vllm:ouro_rows_in_flight") == 0, 30)


def test_a_client_that_does_not_read_slows_nobody_and_gets_everything(server):
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 1000, "anytime": {"trace": True}}
    host, port = server.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # so that little is on its way unread
        slow.connect((host, int(port)))
        connection = http.client.HTTPConnection(host)
        connection.sock = slow
        connection.request("POST", "/v1/anytime/completions", json.dumps(body), {"Content-Type": "application/json"})
        until(lambda: gauge(server, "vllm:num_requests_running") == 1, 60)
        until(lambda: gauge(server, "vllm:ouro_rows_in_flight") > 0, 30)
        other = {**GREEDY, "prompt": PROMPTS[1]}
        checked(ask(server, other), plain(server, other))
        idle(server)  # the engine is done, the client has read nothing
        lines = connection.getresponse().read().decode().split("\n")
    events = [event for line in lines if (event := protocol.decoded(line))]
    checked(events, plain(server, body))


# Programs.


def chat(server: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "ouro_vllm.cli", "chat", "--url", f"{server}/v1", "--temperature", "0"]
    return [*command, "--max-tokens", "20", *options]


def test_chat_in_a_pipe(server):
    expected = plain(server, {"model": MODEL, "messages": SUM, "temperature": 0, "max_tokens": 20})["text"]
    done = subprocess.run(chat(server), input=SUM[0]["content"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected + "\n[") and "mean depth 4.00, stop]" in done.stdout


def test_chat_on_a_terminal_shows_the_tail_dimmed(server):
    lead, follow = pty.openpty()
    question = "Evaluate modulo 7: * + 3 4 - 5 6"
    process = subprocess.Popen(chat(server), stdin=subprocess.PIPE, stdout=follow, cwd=ROOT, text=True)
    os.close(follow)
    process.stdin.write(question + "\n")
    process.stdin.close()
    shown = b""
    while True:
        try:
            part = os.read(lead, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0
    assert b"\x1b[2m" in shown and b"\x1b[J" in shown and b"retracted" in shown


def test_chat_without_a_server(capsys):
    from ouro_vllm.chat import main

    assert main("http://127.0.0.1:9/v1", None, None, {}) == 1
    assert "No server answers at http://127.0.0.1:9/v1" in capsys.readouterr().err


@pytest.mark.parametrize(("program", "name"), [("sh", "curl.sh"), (sys.executable, "client.py"), ("node", "client.js")])
def test_examples(server, program, name):
    example = ROOT / "examples" / "anytime" / name
    assert len(example.read_text().splitlines()) < 30
    needed = "curl" if program == "sh" else program
    if shutil.which(needed) is None:
        pytest.skip(f"{needed} is not installed")
    done = subprocess.run([program, str(example), server], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = plain(server, {"model": MODEL, "prompt": PROMPT, "max_tokens": 48, "temperature": 0})["text"]
    if name == "curl.sh":
        events = [event for line in done.stdout.split("\n") if (event := protocol.decoded(line))]
        assert anytime.reduce(events).committed == expected
    else:
        assert done.stdout == expected + "\n"


def test_the_measurement_of_drafts(server):
    command = [sys.executable, "-m", "ouro_vllm.bench.progressive", "--url", f"{server}/v1"]
    done = subprocess.run([*command, "--tokens", "24", "--rounds", "2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_answer"] and set(found["seconds"]) == {"plain", "drafted", "progressive"}
    assert 0 < found["seconds_draft"] < found["seconds"]["progressive"]
    least, most = found["ratio_least_to_most"]
    assert 0 < least <= found["ratio_draft_to_plain"] <= most


def test_the_measurement_without_a_server():
    command = [sys.executable, "-m", "ouro_vllm.bench.progressive", "--url", "http://127.0.0.1:9/v1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("http://127.0.0.1:9/v1: ")


# The page.


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    command = browser.installed()
    if command is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed (Debian: apt install chromium)")
    with browser.tab(tmp_path_factory.mktemp("browser") / "profile", command) as opened:
        yield opened


TEXT = "[...document.querySelectorAll('.token:not(.provisional)')].map(span => span.textContent).join('')"


def submit(tab: browser.Tab, **values: str) -> None:
    """Fill in the fields and send the form by the keyboard; the page notes what it shows as it goes."""
    for name, value in values.items():
        tab.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")
    tab.run(
        "window.seen = {gone: 0, grey: 0}; window.watcher?.disconnect();"
        "window.watcher = new MutationObserver(() => {"
        " seen.gone += document.querySelectorAll('.gone').length;"
        " seen.grey += document.querySelectorAll('.token.provisional').length;"
        "}); watcher.observe(document.getElementById('answer'), {childList: true, subtree: true, attributes: true});"
        "document.getElementById('prompt').focus()"
    )
    tab.press("Enter", 13, modifiers=2)


def ended(tab: browser.Tab, state: str) -> None:
    tab.until(f"document.getElementById('state').textContent === {json.dumps(state)}")


def test_the_page_settles_to_the_answer(server, tab, tmp_path):
    tab.open(f"{server}/anytime")
    prompt, tokens = PROMPTS[1], 96
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": tokens}
    for _ in range(4):  # on a busy machine several events come at once, of which only the last state is to be seen
        submit(tab, prompt=prompt, tokens=str(tokens))
        ended(tab, "length")
        assert tab.run(TEXT) == plain(server, body)["text"]
        seen = tab.run("seen")
        if seen["grey"] and seen["gone"]:
            break
    assert seen["grey"] > 0 and seen["gone"] > 0
    figures = tab.run(
        "Object.fromEntries([...document.querySelectorAll('.figures b')].map(b => [b.id, b.textContent]))"
    )
    assert figures["committed"] == str(tokens) and figures["provisional"] == "0" and int(figures["retracted"]) > 0
    assert float(figures["speed"]) > 0 and float(figures["mean"]) == 4
    assert figures["agreement"].startswith("1: 0.") and figures["agreement"].endswith("4: 1.00")
    assert tab.run("[...document.querySelectorAll('#legend li')].map(li => li.textContent)") == [
        f"loop {loop}" for loop in range(1, 5)
    ]
    # By keyboard: from the first token to its right neighbour, whose trace is shown.
    tab.run("document.querySelector('.token').focus()")
    tab.press("ArrowRight", 39)
    assert tab.run("document.activeElement.index") == 1
    assert tab.run("document.querySelectorAll('#detail tbody tr').length") == 4
    assert tab.errors == []


def test_the_page_at_a_deadline_shows_the_rest_of_the_draft_in_grey(server, tab, tmp_path):
    """Later and later deadlines, up to the first that leaves time for a part of the answer."""
    tab.call("Emulation.setDeviceMetricsOverride", width=1000, height=1250, deviceScaleFactor=1, mobile=False)
    tab.open(f"{server}/anytime")
    counts = "[committed, provisional].map(count => Number(count.textContent))"
    tab.run(
        "var committed = document.getElementById('committed'), provisional = document.getElementById('provisional')"
    )
    deadline = 100.0
    while not tab.run(counts)[0]:
        submit(tab, prompt=PROMPTS[1], tokens="250", mode="progressive", deadline=str(int(deadline)))
        ended(tab, "deadline")
        deadline *= 1.25
    assert all(tab.run(counts))
    assert tab.run("getComputedStyle(document.querySelector('.token.provisional')).borderBottomStyle") == "dotted"
    tab.run("document.querySelector('.token').focus()")
    tab.press("End", 35)
    tab.run("scrollTo(0, 0)")
    picture = Path(os.environ.get("OURO_SCREENSHOT", tmp_path / "anytime.png"))
    tab.picture(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert tab.errors == []


def test_the_page_on_a_phone_with_reduced_motion(server, tab):
    tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    tab.open(f"{server}/anytime")
    submit(tab, prompt=SUM[0]["content"], kind="chat/completions", mode="progressive", tokens="20")
    ended(tab, "stop")
    body = {"model": MODEL, "messages": SUM, "temperature": 0, "max_tokens": 20}
    assert tab.run(TEXT).strip() == plain(server, body)["text"].strip()
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "wider than the phone"
    assert tab.run("getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"
    smallest = (
        "Math.min(...[...document.querySelectorAll('button, textarea')].map(e => e.getBoundingClientRect().height))"
    )
    assert tab.run(smallest) >= 44


def test_the_page_names_what_was_refused_and_stops(server, tab):
    tab.open(f"{server}/anytime")
    submit(tab, loops="16", tokens="8")
    tab.until("document.getElementById('alert').textContent.startsWith('400: ')")
    assert "ouro_loops" in tab.run("document.getElementById('alert').textContent")
    submit(tab, loops="", tokens="3500")
    tab.until("document.querySelectorAll('.token').length > 5")
    tab.press("Escape", 27)
    ended(tab, "stopped")
    idle(server)
