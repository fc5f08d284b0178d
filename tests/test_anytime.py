"""Anytime without an engine: protocol, reducer, transcript, frames, terminal, and the routes over outputs made here."""

import asyncio
import json
import math
import random
import socket
import subprocess
import sys
import threading
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_vllm.anytime import Answer, AnytimeError, AnytimeOptions, events, protocol, reduce
from ouro_vllm.anytime.frames import HISTORY, Watch, ahead
from ouro_vllm.anytime.pieces import Pieces, Text, cut
from ouro_vllm.anytime.transcript import Transcript, remainder
from ouro_vllm.chat import Screen
from ouro_vllm.options import OptionError, OuroOptions, RequestOptions
from ouro_vllm.wavefront.flight import Flight

# A tokenizer: token i is the i-th of these, so that characters are spread over tokens.

BYTES = [
    b"a",
    b"b ",
    b"\n",
    b"caf",
    "é".encode(),
    "é".encode()[:1],
    "é".encode()[1:],
    *(bytes([b]) for b in "🙂".encode()),
]
BYTES += [b" STOP", b"ST", b"OP", "語".encode(), "語".encode()[:2], "語".encode()[2:]]


def decode(ids) -> str:
    return b"".join(BYTES[token] for token in ids).decode("utf-8", errors="replace")


IDS = st.lists(st.integers(0, len(BYTES) - 1), max_size=40)
DICE = st.randoms(use_true_random=False)


# What may be asked.


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([1], "`anytime` must be an object"),
        ({"mood": "tail"}, "unknown option `anytime.mood`. Allowed: `mode`, `deadline_ms`, `trace`"),
        ({"mode": "slow"}, '`anytime.mode` is \'slow\'; it must be "tail" or "progressive"'),
        ({"mode": ["tail"]}, "`anytime.mode` is"),
        ({"deadline_ms": 0}, "`anytime.deadline_ms` is 0; it must be a whole number from 1"),
        ({"deadline_ms": True}, "`anytime.deadline_ms` is True"),
        ({"deadline_ms": 1.5}, "`anytime.deadline_ms` is 1.5"),
        ({"deadline_ms": 10**9}, "`anytime.deadline_ms` is 1000000000"),
        ({"trace": 1}, "`anytime.trace` is 1; it must be true or false"),
    ],
)
def test_bad_options_are_named(given, named):
    with pytest.raises(OptionError) as raised:
        AnytimeOptions.parse(given)
    assert str(raised.value).startswith(named)


def test_options():
    assert AnytimeOptions.parse(None) == AnytimeOptions.parse({}) == AnytimeOptions("tail", None, False)
    given = {"mode": "progressive", "deadline_ms": 250, "trace": True}
    assert AnytimeOptions.parse(given) == AnytimeOptions(**given)


@pytest.mark.parametrize(
    "given",
    [{"ouro_anytime": 3}, {"ouro_anytime": "1"}, {"ouro_draft": "5"}, {"ouro_draft": [1, -1]}, {"ouro_draft": [1.0]}],
)
def test_bad_options_for_the_engine_are_named(given):
    with pytest.raises(OptionError, match=f"`{next(iter(given))}`"):
        RequestOptions.parse(given)


@pytest.mark.parametrize(
    ("draft", "named"), [([0, 256], "names token 256; the model's are 0 to 255"), ([1] * 9, "has 9 tokens.*has 8")]
)
def test_a_draft_that_would_end_the_engine_is_refused(draft, named):
    RequestOptions.parse({"ouro_draft": [255] * 8}).check_draft(256, 8)
    with pytest.raises(OptionError, match=f"`ouro_draft` {named}"):
        RequestOptions.parse({"ouro_draft": draft}).check_draft(256, 8)


# Texts of tokens.


@given(IDS, IDS)
def test_pieces_are_the_text_and_looking_ahead_changes_nothing(prompt, ids):
    pieces, prompt = Pieces(decode, [0, *prompt, 0]), [0, *prompt, 0]
    told = ""
    for place, token in enumerate(ids):
        expected = [pieces.peek(ids[place:])[0]]
        assert pieces.peek(ids[place:]) == pieces.peek(ids[place:])
        piece = pieces.push(token)
        assert [piece] == expected
        told += piece
    rest = decode(ids)[len(told) :]
    assert decode(ids).startswith(told)
    assert set(rest) <= {"\ufffd"} or "\ufffd" in decode(ids)


@given(st.text(max_size=12), st.lists(st.text(max_size=4), min_size=1, max_size=6))
def test_cut_keeps_the_text_and_the_number(text, pieces):
    parts = cut(text, pieces)
    assert "".join(parts) == text and len(parts) == len(pieces)
    if text == "".join(pieces):
        assert parts == pieces


@given(IDS, st.integers(0, 5))
def test_a_text_that_lags_is_told_apart_into_its_tokens(ids, lag):
    """Somebody sends the text late; what is held comes in front of what may follow."""
    text, sent, told = Text(decode, []), 0, ""
    for place, token in enumerate(ids):
        known = "".join(Pieces(decode, []).peek(ids[: place + 1]))
        now = max(sent, len(known) - lag)
        parts = text.take([token], known[sent:now])
        told, sent = told + "".join(parts), now
        assert told == known[:sent] and len(parts) == 1
        following = ids[place + 1 :]
        if following:
            assert told + "".join(text.ahead(following)) == "".join(Pieces(decode, []).peek(ids))


# Events. The engine here says what it likes; the slow reference keeps whole lists.


class Slow:
    """What a client should know, by the words of the protocol: lists rebuilt at every event."""

    def __init__(self) -> None:
        self.final, self.tail, self.text, self.lost = [], [], "", 0

    def feed(self, event) -> None:
        if event["type"] not in ("commit", "provisional"):
            return
        before, now = self.tail, event["token_ids"]
        wrong = [n for n in range(len(before)) if n >= len(now) or before[n] != now[n]]
        if event["type"] == "provisional":
            self.lost += len(before) - wrong[0] if wrong else 0
            self.tail, self.text = now, event["text"]
            return
        self.final = self.final + now
        if before[: len(now)] == now and self.text.startswith(event["text"]):
            self.tail, self.text = before[len(now) :], self.text[len(event["text"]) :]
        else:
            self.lost += len(before) - wrong[0] if wrong else 0
            self.tail, self.text = [], ""


def frame_for(dice: random.Random, known: list[int], answer: list[int], trace: bool) -> dict | None:
    """What an engine might send when `known` of `answer` is decided; now and then nothing, or an old frame."""
    if dice.random() < 0.1:
        return None
    tail = answer[len(known) : len(known) + dice.randint(0, 4)]
    tail = [token if dice.random() < 0.7 else dice.randrange(len(BYTES)) for token in tail]
    history = min(HISTORY, len(known))
    said = (
        [[[1, dice.randrange(len(BYTES)), 0.5, 0.25], [2, token, 1.0, 0.5]] for token in known[-history:]]
        if history
        else []
    )
    return {
        "index": len(known) - (dice.random() < 0.1 and len(known) > 0),
        "tokens": tail,
        "depths": [dice.randint(0, 4) for _ in tail],
        "first": [dice.randrange(len(BYTES)), 1],
        "decided": [4] * history,
        "said": said if trace else [],
    }


def story(
    dice: random.Random, answer: list[int], stops: list[str], progressive: bool
) -> tuple[list[dict], str, list[int]]:
    """Events of one request with `answer`. Returns them, the text vLLM would answer, and its tokens."""
    trace = dice.random() < 0.5
    transcript, events = Transcript(decode, [0, 1], stops, trace, len(answer)), []
    if progressive:
        draft, place = [t if dice.random() < 0.9 else dice.randrange(len(BYTES)) for t in answer], 0
        while True:
            step, end = draft[place : place + dice.randint(1, 5)], 0
            end = place + len(step)
            text = "".join(Pieces(decode, []).peek(draft[:end]))[len("".join(Pieces(decode, []).peek(draft[:place]))) :]
            place = end
            events += transcript.drafted(step, text, 1, place >= len(draft))
            if place >= len(draft):
                break
    hold = max((len(stop) for stop in stops), default=1) - 1
    known, sent, whole, ended = 0, 0, "", False
    while not ended:
        step = answer[known : known + dice.randint(1, 6)]
        for number in range(1, len(step) + 1):
            whole = "".join(Pieces(decode, []).peek(answer[: known + number]))
            found = [whole.find(stop) for stop in stops if stop in whole]
            if found:
                whole, step, ended = whole[: min(found)], step[:number], True
                break
        known += len(step)
        ended = ended or known >= len(answer)
        upto = len(whole) if ended else max(sent, len(whole) - hold)
        text, sent = whole[sent:upto], upto
        frame = frame_for(dice, answer[:known], answer, trace)
        events += transcript.told(step, text, frame, ended)
    events.append(transcript.done("stop"))
    return events, whole, answer[:known]


@settings(max_examples=200, deadline=None)
@given(IDS.filter(bool), st.booleans(), st.booleans(), DICE)
def test_events_reduce_to_the_answer_whatever_was_provisional(answer, stopping, progressive, dice):
    events, text, tokens = story(dice, answer, [" STOP", "STOP"] if stopping else [], progressive)
    client, slow, before = Answer(), Slow(), ""
    for event in events:
        event = protocol.decoded(protocol.encoded(event).rstrip("\n"))  # as it is on the wire
        client.feed(event)
        slow.feed(event)
        assert client.committed.startswith(before), "what was committed has changed"
        before = client.committed
        assert client.token_ids == slow.final
        assert len(client.token_ids + client.tail_ids) <= len(answer)
        assert (client.tail_ids, client.provisional if client.tail_ids else "") == (
            slow.tail,
            slow.text if slow.tail else "",
        )
        assert "".join(client.tail_pieces) == client.provisional and "".join(client.pieces) == client.committed
        assert len(client.pieces) == len(client.token_ids) == len(client.depth)
        assert len(client.tail_pieces) == len(client.tail_ids) == len(client.tail_depth)
        assert client.retracted == slow.lost
        if stopping:
            assert "STOP" not in client.committed + client.provisional or progressive
    assert client.committed == text and client.token_ids == tokens
    assert client.provisional == "" and client.tail_ids == []
    assert client.done["committed"] == len(tokens) and client.done["provisional"] == 0
    assert client.done["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(tokens),
        "total_tokens": 2 + len(tokens),
    }
    assert reduce(events) == client


@settings(max_examples=50, deadline=None)
@given(IDS.filter(bool), DICE)
def test_the_first_event_is_provisional_and_a_tail_continues_the_committed_text(answer, dice):
    events, _, _ = story(dice, answer, [], False)
    kinds = [event["type"] for event in events]
    client = Answer()
    for event in events:
        client.feed(event)
        if event["type"] == "provisional" and event["token_ids"] and "\ufffd" not in decode(client.token_ids):
            whole = "".join(Pieces(decode, [0, 1]).peek(client.token_ids + client.tail_ids))
            assert client.committed + client.provisional == whole
    if kinds[0] != "provisional":
        assert kinds[0] == "commit"  # the frame was lost: the answer arrives all the same


def test_what_agrees_with_a_whole_draft_is_not_sent_again():
    transcript = Transcript(decode, [], [], False)
    draft = [0, 1, 0, 1, 0, 3, 0, 1]
    events = transcript.drafted(draft[:4], decode(draft[:4]), 1, False) + transcript.drafted(
        draft[4:], decode(draft[4:]), 1, True
    )
    assert [event["type"] for event in events] == ["provisional", "provisional"] and events[-1]["complete"]
    for place in range(0, 4, 2):
        told = transcript.told(draft[place : place + 2], decode(draft[place : place + 2]), None, False)
        assert [event["type"] for event in told] == ["commit"]
    assert transcript.client.tail_ids == draft[4:] and transcript.client.complete
    (commit, tail) = transcript.told([2], decode([2]), {"index": 5, "tokens": [3], "depths": [2]}, False)
    assert commit["token_ids"] == [2]  # another token than the draft's
    assert (tail["token_ids"], tail["depth"]) == ([3], [2])
    assert transcript.client.retracted == 4 and not transcript.client.complete


def test_a_draft_is_taken_up_again_where_the_answer_comes_back_to_it():
    assert remainder([1, 2, 3, 4, 5, 6, 7, 8], [1, 9, 9, 3, 4, 5, 6]) == [7, 8]
    assert remainder([1, 2, 3, 4, 5, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4]) == [5, 1, 2, 3, 4, 6]  # the nearest one
    assert remainder([1, 2, 3, 4, 5], [2, 3, 4]) == []  # too short to be sure
    assert remainder([1, 2, 3, 4, 5], [9, 8, 7, 6]) == []


def test_a_draft_that_is_taken_up_again_ends_where_the_answer_must():
    transcript = Transcript(decode, [], [], False, longest=8)
    transcript.drafted([0, 1, 0, 3, 0, 1, 1, 0], "", 1, True)
    transcript.told([1, 1, 0, 1, 0, 3], "", None, False)  # two tokens later than in the draft
    assert transcript.client.tail_ids == [0, 1] and transcript.client.tail_depth == [1, 1]


def test_a_reader_that_is_late_gets_all_commits_in_one_and_the_newest_tail():
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    queue, watch, count = RequestOutputCollector(RequestOutputKind.DELTA, "x"), Watch(traced=True), 200
    for number in range(count):
        watch.commit(flying((1, [2, number % 2])), 6, 1)
        frame = watch.frame(flying((3, [0, 1])), 5, number + 1)
        new = CompletionOutput(0, "a", [0], None, None)
        queue.put(RequestOutput("x", None, [], None, [new], False, kv_transfer_params={"ouro": frame}))
    merged = queue.get_nowait()
    assert queue.get_nowait() is None
    transcript = Transcript(decode, [], [], True)
    events = transcript.told(
        merged.outputs[0].token_ids, merged.outputs[0].text, merged.kv_transfer_params["ouro"], False
    )
    kinds = [event["type"] for event in events]
    assert kinds == ["provisional", "commit", *["trace"] * HISTORY, "provisional"]
    assert events[1]["text"] == "a" * count
    assert events[1]["depth"] == [None] * (count - HISTORY) + [2] * HISTORY
    assert [event["index"] for event in events[2:-1]] == list(range(count - HISTORY, count))
    assert (events[-1]["token_ids"], events[-1]["depth"]) == ([1], [2])


def test_lost_events_are_noticed():
    with pytest.raises(ValueError, match="a commit at token 3, 0 being committed: events lost"):
        Answer().feed(protocol.commit(3, [1], "a", ["a"], [4]))


def test_lines_on_the_wire_hold_no_strange_line_ends():
    event = protocol.commit(0, [1], "a\u2028b\x85\r\n", ["a\u2028b\x85\r\n"], [4])
    wire = protocol.encoded(event)
    assert wire.isascii() and len(wire.splitlines()) == 2 and wire.endswith("\n\n")
    assert protocol.decoded(wire.splitlines()[0]) == event
    assert [protocol.decoded(line) for line in ("", ": keep-alive", "data: [DONE]")] == [None] * 3


@pytest.mark.parametrize(
    ("change", "key"), [({}, "ключ"), ({"temperature": math.nan}, None), ({"address": "http://127.0.0.1:8 0"}, None)]
)
def test_what_cannot_be_sent_is_one_error(change, key):
    async def asked() -> None:
        body = {"prompt": "x", **change}
        async for _ in events(body.pop("address", "http://127.0.0.1:9/v1"), body, key):
            pass

    with pytest.raises(AnytimeError):
        asyncio.run(asked())


def test_a_server_of_another_kind_is_one_line(capsys):
    from ouro_vllm.chat import main

    with socket.create_server(("127.0.0.1", 0)) as strange:

        def greet() -> None:
            with strange.accept()[0] as client:
                client.recv(1000)
                client.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        assert main(f"http://127.0.0.1:{strange.getsockname()[1]}/v1", None, None, {}) == 1
        thread.join()
    errors = capsys.readouterr().err
    assert "does not speak HTTP" in errors and errors.count("\n") == 1


def test_client_code_needs_neither_torch_nor_vllm():
    script = "import sys, ouro_vllm.anytime, ouro_vllm.chat; print({'torch', 'vllm', 'httpx'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# Frames.


def flying(*rows: tuple[int, list[int]]) -> Flight:
    """A flight from position 5 on: (token, readouts from loop 1 on)."""
    flight = Flight(4)
    for number, (token, heard) in enumerate(rows):
        row = flight.board(number, 5 + number, token)
        row.heard, row.since, row.depth = heard, min(1, len(heard)), len(heard)
        row.said = [(0.5, 0.25)] * len(heard)
    return flight


def test_the_tail_is_what_rows_stand_on_and_what_the_newest_says():
    flight = flying((1, [7, 2, 2]), (2, [3, 3]), (3, [4]))
    assert ahead(flight, 5) == ([2, 3, 4], [3, 2, 1])
    assert ahead(flight, 4) == ahead(flight, 6) == ([], [])
    flight.stops = frozenset([3])
    assert ahead(flight, 5) == ([2], [3])
    assert ahead(flying((1, []), (2, [])), 5) == ([2], [0])  # a guess
    assert ahead(Flight(4), 5) == ([], [])


def test_a_watch_remembers_what_was_said_and_is_bounded():
    watch = Watch(traced=True)
    watch.commit(flying((1, [7, 2, 2, 2]), (2, [3, 3, 3])), 7, 2)
    assert watch.first == [7, 1]
    frame = watch.frame(flying((3, [4])), 5, 2)
    assert frame["decided"] == [4, 3]
    assert [[loop[:2] for loop in said] for said in frame["said"]] == [
        [[1, 7], [2, 2], [3, 2], [4, 2]],
        [[1, 3], [2, 3], [3, 3]],
    ]
    assert (frame["index"], frame["tokens"], frame["depths"]) == (2, [4], [1])
    for _ in range(HISTORY):
        watch.commit(flying((1, [2])), 6, 1)
    assert len(watch.decided) == len(watch.said) == HISTORY and watch.first == [7, 1]
    watch.commit(Flight(4), 6, 1)  # computed plainly: nothing was heard
    assert watch.frame(None, 6, 9)["decided"][-1] is None and json.dumps(watch.frame(None, 6, 9))


# Streams of an engine in this process, for the modules that have one.


def streams(llm, asked: list[list[int]], tokens: int, drafts: bool = True) -> list[Answer]:
    """Answers to prompts of token ids that go through `llm` together as anytime requests, greedy, of `tokens` tokens.

    Every other one is traced; with `drafts` every third brings one along, made by the same engine at depth 1. Each
    event is fed to the reducer and to its slow reference.
    """
    from functools import partial

    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    wish = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked]
    shallow = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"ouro_loops": 1})
    drafted = llm.generate(prompts[::3], shallow, use_tqdm=False) if drafts else []
    engine, decode = llm.llm_engine, partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    transcripts, clients, slow = [], [Answer() for _ in asked], [Slow() for _ in asked]

    def tell(number: int, events: list[dict]) -> None:
        client, before = clients[number], clients[number].committed
        for event in events:
            client.feed(event)
            slow[number].feed(event)
            assert client.committed.startswith(before)
            assert (client.token_ids, client.tail_ids) == (slow[number].final, slow[number].tail)
            assert client.retracted == slow[number].lost
            assert len(client.token_ids) + len(client.tail_ids) <= tokens
            assert all(0 <= depth <= 4 for depth in client.tail_depth)

    for number, prompt in enumerate(prompts):
        traced = number % 2 == 0
        transcripts.append(Transcript(decode, asked[number], [], traced, tokens))
        new, extra = wish.clone(), {"ouro_anytime": 1 + traced}
        if drafts and number % 3 == 0:
            draft = drafted[number // 3].outputs[0]
            tell(number, transcripts[number].drafted(draft.token_ids, draft.text, 1, True))
            extra["ouro_draft"] = list(draft.token_ids)
        new.extra_args = extra
        engine.add_request(f"{number}", prompt, new)
    while engine.has_unfinished_requests():
        for output in engine.step():
            number, new = int(output.request_id), output.outputs[0]
            frame = (output.kv_transfer_params or {}).get("ouro")
            assert frame is not None or output.finished
            tell(number, transcripts[number].told(new.token_ids, new.text, frame, output.finished))
    for number, client in enumerate(clients):
        assert client.provisional == "" and client.tail_ids == [] and len(client.token_ids) == tokens
        assert sorted(client.traces) == (list(range(tokens)) if number % 2 == 0 else [])
        for place, said in client.traces.items():
            assert (said[-1]["token_id"], said[-1]["depth"]) == (client.token_ids[place], client.depth[place])
    return clients


# The terminal.


class Terminal:
    """As much of a terminal as `Screen` needs, written from the ECMA-48 control functions it uses."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.rows, self.row, self.column, self.scrolled = [[]], 0, 0, 0
        self.lowest = 0

    def write(self, text: str) -> None:
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                end = next(n for n in range(place + 2, len(text)) if text[n].isalpha())
                self.control(text[place + 2 : end], text[end])
                place = end + 1
                continue
            self.put(text[place])
            place += 1

    def control(self, argument: str, name: str) -> None:
        count = int(argument or 1) if name != "m" else 0
        if name == "A":
            assert self.row - count >= max(0, self.lowest - self.lines + 1), "above the screen"
            self.row -= count
        elif name == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif name == "J":
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]

    def put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            self.rows += [[]] * (self.row - len(self.rows) + 1)
            self.lowest = max(self.lowest, self.row)
        else:
            assert self.column < self.columns, "the terminal would have wrapped"
            line = self.rows[self.row] + [" "] * (self.column - len(self.rows[self.row]))
            line[self.column :] = [character]
            self.rows[self.row] = line
            self.column += 1

    def shown(self) -> str:
        return "\n".join("".join(row) for row in self.rows)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab \n", max_size=15), st.text("xy \n", max_size=40)), max_size=12),
    st.integers(8, 20),
    st.integers(2, 6),
)
def test_the_screen_shows_what_is_settled_and_the_tail_behind_it(steps, columns, lines):
    terminal = Terminal(columns, lines)
    screen, settled = Screen(terminal.write, columns, lines), ""
    for text, tail in steps:
        screen.settle(text)
        settled += text
        screen.show(tail)
        plain = Terminal(columns, 10**6)
        Screen(plain.write, columns, 10**6).settle(settled + tail)
        shown, wanted = terminal.shown(), plain.shown()
        assert shown == wanted or (wanted.startswith(shown) and screen.below == lines - 1)  # a tail too long is cut
    screen.show("")
    alone = Terminal(columns, 10**6)
    Screen(alone.write, columns, 10**6).settle(settled)
    assert terminal.shown() == alone.shown()


def test_the_screen_passes_no_control_characters_on():
    written: list[str] = []
    Screen(written.append, 40, 10).settle("a\x1b[2Jb\x07")
    assert "".join(written) == "a[2Jb"


# The routes, over outputs made here.

PROGRESSIVE = {"anytime": {"mode": "progressive"}}


def output(ids, text, finished=False, reason=None, frame=None):
    new = SimpleNamespace(token_ids=list(ids), text=text, finish_reason=reason or ("length" if finished else None))
    params = None if frame is None else {"ouro": frame}
    return SimpleNamespace(outputs=[new], finished=finished, prompt_token_ids=[0, 0], kv_transfer_params=params)


class Service:
    """In the place of vLLM's serving: answers with outputs, and remembers what became of its streams."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked, self.closed = list(answers), [], 0
        self.server = OuroOptions(4)
        self.renderer = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: decode(ids)))

    async def ask(self, request, raw_request):
        self.asked.append(request)
        answer = self.answers.pop(0)
        return self.stream(answer) if isinstance(answer, list) else answer

    async def stream(self, outputs):
        try:
            for item in outputs:
                if isinstance(item, Exception):
                    raise item
                if item == "for ever":
                    await asyncio.Event().wait()
                yield item
        finally:
            self.closed += 1


@pytest.fixture
def app():
    """The routes with vLLM's error handling and its API key, and the place for a service."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    from ouro_vllm.anytime.endpoint import AnytimeEndpoints

    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    AnytimeEndpoints().attach_router(app)
    init_exception_handler(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    return app


@pytest.fixture
def post(app):
    from starlette.testclient import TestClient

    def post(service, body, path="completions", key="secret"):
        app.state.ouro_anytime = SimpleNamespace(completion=service, chat=service, server=service.server)
        client = TestClient(app, raise_server_exceptions=False)
        return client.post(f"/v1/anytime/{path}", json=body, headers={"Authorization": f"Bearer {key}"} if key else {})

    return post


def told(response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    return [event for line in response.text.splitlines() if (event := protocol.decoded(line))]


def test_routes_are_behind_the_key_and_the_page_is_not(app, post):
    from starlette.testclient import TestClient

    for path in ("completions", "chat/completions"):
        assert post(Service(), {"prompt": "x"}, path, key=None).status_code == 401
        assert post(Service(), {"prompt": "x"}, path, key="wrong").status_code == 401
    page = TestClient(app).get("/anytime")
    assert page.status_code == 200 and "<title>Ouro, anytime</title>" in page.text
    assert "http" not in page.text.replace("http-equiv", ""), "the page needs nothing from elsewhere"


def test_a_stream(post):
    frame = {"index": 1, "tokens": [1], "depths": [2], "first": [3, 1], "decided": [4], "said": []}
    service = Service([output([0], "a", frame=frame), output([1, 2], "b \n", True)])
    events = told(post(service, {"prompt": "x", "vllm_xargs": {"ouro_loops": 3}}))
    assert [event["type"] for event in events] == ["provisional", "commit", "provisional", "commit", "done"]
    assert [event.get("token_ids") for event in events[:-1]] == [[3], [0], [1], [1, 2]]
    assert events[-1] == protocol.done("length", 2, 3, 0, 4.0)
    assert service.asked[0].stream and service.asked[0].vllm_xargs == {"ouro_loops": 3, "ouro_anytime": 1}
    assert service.closed == 1


def test_traces_are_sent_if_asked_for(post):
    said = [[1, 3, 0.25, 0.125], [2, 0, 1.0, 0.5]]
    frame = {"index": 1, "tokens": [], "depths": [], "first": None, "decided": [2], "said": [said]}
    service = Service([output([0], "a", True, frame=frame)])
    events = told(
        post(service, {"messages": [{"role": "user", "content": "x"}], "anytime": {"trace": True}}, "chat/completions")
    )
    assert [event["type"] for event in events] == ["commit", "trace", "done"]
    assert events[1] == protocol.trace(
        0,
        0,
        [
            {"depth": 1, "token_id": 3, "text": "caf", "probability": 0.25, "lambda": 0.125},
            {"depth": 2, "token_id": 0, "text": "a", "probability": 1.0, "lambda": 0.5},
        ],
    )
    assert service.asked[0].vllm_xargs == {"ouro_anytime": 2}


def test_progressive_drafts_at_depth_one_and_verifies_with_the_draft(post):
    service = Service(
        [output([0, 1], "ab "), output([2], "\n", True)], [output([0], "a"), output([3, 0], "cafa", True)]
    )
    body = {"prompt": "x", "anytime": {"mode": "progressive"}}
    events = told(post(service, {**body, "vllm_xargs": {"ouro_exit_threshold": 0.5, "ouro_loops": 3}}))
    assert [event["type"] for event in events] == ["provisional", "provisional", "commit", "commit", "done"]
    assert [event.get("complete") for event in events[:2]] == [None, True]
    assert events[1]["text"] == "ab \n" and events[1]["depth"] == [1, 1, 1]
    assert reduce(events).committed == "acafa" and reduce(events).retracted == 2
    draft, answer = service.asked
    assert draft.vllm_xargs == {"ouro_anytime": 0, "ouro_loops": 1}
    assert answer.vllm_xargs == {
        "ouro_exit_threshold": 0.5,
        "ouro_loops": 3,
        "ouro_anytime": 1,
        "ouro_draft": [0, 1, 2],
    }
    assert draft.seed == answer.seed is not None
    assert service.closed == 2


@pytest.mark.parametrize(
    ("mode", "answers", "committed", "provisional", "streams"),
    [
        ("tail", [[output([0], "a", frame={"index": 1, "tokens": [1], "depths": [3]}), "for ever"]], "a", "b ", 1),
        ("tail", [["for ever"]], "", "", 1),
        ("progressive", [[output([0, 1], "ab "), "for ever"]], "", "ab ", 1),
        ("progressive", [[output([0, 1], "ab ", True)], [output([0], "a"), "for ever"]], "a", "b ", 2),
        ("progressive", [[output([0, 1], "ab ", True)], ["for ever"]], "", "ab ", 2),
    ],
)
def test_at_the_deadline_the_best_answer_so_far_stands(post, mode, answers, committed, provisional, streams):
    service = Service(*answers)
    events = told(post(service, {"prompt": "x", "anytime": {"mode": mode, "deadline_ms": 100}}))
    answer = reduce(events)
    assert (answer.committed, answer.provisional) == (committed, provisional)
    assert answer.done["finish_reason"] == "deadline" and answer.done["provisional"] == len(answer.tail_ids)
    assert service.closed == streams  # the request has been given up


def test_an_error_in_mid_stream_is_told(post):
    service = Service([output([0], "a"), output([], "", True, reason="error")])
    events = told(post(service, {"prompt": "x"}))
    assert [event["type"] for event in events] == ["commit", "error"]
    assert events[-1]["error"]["code"] == 500
    service = Service([output([0], "a"), RuntimeError("gone wrong")])
    assert told(post(service, {"prompt": "x"}))[-1]["type"] == "error"


def test_refusals_come_as_a_status(post):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMValidationError

    refused = post(
        Service(create_error_response("no such model", "NotFoundError", HTTPStatus.NOT_FOUND)), {"prompt": "x"}
    )
    assert refused.status_code == 404 and refused.json()["error"]["message"] == "no such model"
    late = post(Service([VLLMValidationError("bad", parameter="x")]), {"prompt": "x"})
    assert late.status_code == 400 and late.json()["error"]["message"].startswith("bad")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": "x", "n": 2}, "`n` is not for anytime endpoints"),
        ({"prompt": ["x", "y"]}, "`prompt` is not for"),
        ({"prompt": [[5], [6]]}, "`prompt` is not for"),
        ({"prompt": "x", "prompt_embeds": ["eA=="]}, "`prompt` is not for"),
        ({"prompt": "x", "echo": True}, "`echo`"),
        ({"prompt": "x", "logprobs": 1}, "`logprobs`"),
        ({"prompt": "x", "use_beam_search": True}, "`use_beam_search`"),
        ({"prompt": "x", "anytime": {"mode": "slow"}}, "`anytime.mode` is 'slow'"),
        ({"prompt": "x", "anytime": 5}, "`anytime` must be an object"),
        ({"prompt": "x", "vllm_xargs": {"ouro_draft": [1]}}, "`ouro_draft` is set by this endpoint itself"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "vllm_xargs": {"ouro_exit_threshold": 5}, **PROGRESSIVE}, "`ouro_exit_threshold` is 5"),
        ({"prompt": "x", "vllm_xargs": {"ouro_loops": 5}, **PROGRESSIVE}, "`ouro_loops` is 5"),
        ({"prompt": "x", "vllm_xargs": {"ouro_min_loops": 0}, **PROGRESSIVE}, "`ouro_min_loops` is 0"),
    ],
)
def test_what_has_no_anytime_form_is_a_400_that_names_it(post, body, named):
    service = Service()
    response = post(service, body)
    assert response.status_code == 400 and named in response.json()["error"]["message"], response.text
    assert not service.asked


def test_a_draft_needs_a_server_that_knows_its_depth(post):
    service = Service()
    service.server = OuroOptions(4, kv_sharing="last")
    error = post(service, {"prompt": "x", **PROGRESSIVE}).json()["error"]
    assert error["code"] == 400 and error["message"].startswith('`anytime.mode` "progressive" begins with a draft')
    service = Service([output([0], "a", True)])
    service.server = OuroOptions(4, kv_sharing="last")
    assert reduce(told(post(service, {"prompt": ["x"]}))).committed == "a"


def test_tools_are_refused(post):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    assert "`tools`" in post(Service(), body, "chat/completions").json()["error"]["message"]
