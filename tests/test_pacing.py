"""How the pace is chosen from what passes cost and how often early loops agree. No engine."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouro_vllm.wavefront.pacing import (
    DOUBT,
    FEWEST,
    LAPS,
    LATEST,
    LOOK,
    SHARE,
    TRIALS,
    Batch,
    Pace,
    Pacer,
    PassCost,
    StepReport,
    bucket,
)
from ouro_vllm.wavefront.waves import GUESSES, Counts

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def taught(cost, settled=(700, 200, 70, 30), guesses=(0, 0, 0), hits=(0, 0, 0), fixed=None) -> Pacer:
    """A pacer for 4 loops that has seen passes cost `cost(rows)`, with 3 rows per request in them, and rows settle so
    often by each loop.

    guesses, hits: in a thousand tokens, by place.
    """
    pacer = Pacer(4, 8, fixed)
    shapes = [(rows, cost(rows)) for rows in SIZES for _ in range(3)]
    looked = dict(guesses=list(guesses), hits=list(hits), looked=[1000] * GUESSES, rows=3000, lane_passes=1000)
    pacer.learn(StepReport(Counts(settled=list(settled), finished=1000, shapes=shapes, **looked), 0))
    return pacer


def test_rows_that_are_free_are_fed_early():
    assert taught(lambda rows: 1.0, guesses=(400, 0, 0), hits=(10, 0, 0)).decide(8, False).entry in (0, 1)
    assert taught(lambda rows: 1.0, guesses=(500, 0, 0), hits=(400, 0, 0)).decide(8, False).entry == 0


def test_rows_that_cost_in_proportion_are_not_wasted():
    assert taught(float, guesses=(500, 0, 0), hits=(20, 0, 0)).decide(8, False).entry == 4


def test_the_first_guess_of_a_pass_is_right_more_often():
    """Counts like the bundled checkpoint's: three where rows are free, one where no longer, none where all cost."""
    counted = dict(guesses=(520, 310, 200), hits=(310, 95, 35))
    assert taught(lambda rows: 1.0, **counted).decide(4, False) == Pace(0, 8, 3)
    assert taught(lambda rows: 16 + 2 * max(0, rows - 16), **counted).decide(4, False) == Pace(0, 8, 1)
    assert taught(float, **counted).decide(4, False).entry == 4


def test_the_knee_between_decides():
    """Free up to 16 rows, dear beyond: one request drafts as early as can be, thirty-two feed only what is decided."""
    pacer = taught(lambda rows: max(16, rows), guesses=(400, 0, 0), hits=(10, 0, 0))
    assert pacer.decide(2, False).entry in (0, 1)
    assert pacer.decide(32, False).entry == 4


@pytest.mark.parametrize(("hits", "entry"), [(10, 1), (200, 0)])
def test_a_small_promise_changes_nothing(hits, entry):
    """Lookups that save one pass in a hundred tokens are not worth going back and forth for; one in five are."""
    pacer = taught(lambda rows: 1.0, guesses=(400, 0, 0), hits=(hits, 0, 0))
    pacer.entry = 1
    assert pacer.decide(8, False).entry == entry


def test_another_entry_is_looked_at_now_and_then():
    pacer = taught(float)
    entries = [pacer.decide(8, False).entry for _ in range(6 * LOOK)]
    assert {entries[number] for number in range(LOOK - 1, len(entries), LOOK)} == {0, 1, 4}
    assert entries.count(4) >= len(entries) - 6


def test_a_fixed_entry_stays_and_a_hurry_has_no_burst():
    pacer = taught(float, fixed=2)
    assert [pacer.decide(8, hurry) for hurry in (False, True)] == [Pace(2, 8), Pace(2, 0)]
    assert {pacer.decide(1, False).entry for _ in range(3 * LOOK)} == {2}
    assert Pacer(4, 8).decide(0, True) == Pace(0, 0, piece=8)  # nothing known, nothing to decide


@pytest.mark.parametrize(("seconds", "pieces"), [(1.0, 8), (0.006, 8), (0.004, 4), (0.002, 2), (0.0001, 1)])
def test_bursts_of_slow_passes_have_more_pieces(seconds, pieces):
    """So that nobody who comes waits for much more than 10 ms, and fast passes are not held up by being asked."""
    for fixed in (None, 1):
        assert taught(lambda rows: seconds, fixed=fixed).decide(2, False).pieces == pieces
    assert taught(lambda rows: seconds).decide(2, True).pieces == 1


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1.0)), min_size=1, max_size=60))
def test_more_rows_never_cost_less(passes):
    cost = PassCost()
    for rows, seconds in passes:
        cost.learn(rows, seconds)
    times = [cost.of(rows / 2) for rows in range(1, 900)]
    assert all(more >= less * (1 - 1e-9) for less, more in pairwise(times))  # but for rounding
    assert 1e-4 <= times[0]


def test_a_cold_start_is_forgotten():
    cost = PassCost()
    for seconds in [5.0, *[0.001] * LATEST]:
        cost.learn(4, seconds)
    assert cost.of(4) == 0.001
    assert PassCost().of(3) == 0


@pytest.mark.parametrize(
    ("rows", "wanted"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (6, 6), (7, 8), (9, 12), (17, 24)]
)
def test_buckets(rows, wanted):
    assert bucket(rows) == wanted


# Plain steps against drafting.


class Server:
    """Steps on a clock of their own: a request's token costs `drafting` or `plain` seconds, a prompt's `prompt`.

    A drafting step runs the passes of the tokens that the next one commits, `burst` per request, or 4 in a hurry.
    """

    def __init__(self, pacer: Pacer, drafting: float, plain: float, prompt: float = 0.0, burst: int = 7) -> None:
        self.pacer, self.drafting, self.plain, self.prompt, self.burst = pacer, drafting, plain, prompt, burst
        self.now, self.tokens, self.drafted, self.steps = 0.0, 0, 0, []

    def step(
        self,
        lanes: int,
        fresh: int = 0,
        drawn: bool = False,
        hurry: bool = False,
        busy: bool = True,
        led: bool = False,
        alone: bool = False,
    ) -> Pace:
        """fresh: requests whose prompts, 50 tokens each, end in this step."""
        pace = self.pacer.begin(self.now, Batch(lanes, hurry, led, drawn, 50 * fresh, fresh, alone))
        ran_plain = pace.plain and not self.drafted  # drafts have to be verified first
        committed = lanes if not self.drafted else fresh + self.drafted * (lanes - fresh)
        self.drafted = 0 if pace.plain else self.burst if pace.passes else 4
        self.now += lanes * (self.drafted * self.drafting or self.plain) + 50 * fresh * self.prompt
        self.pacer.end(committed, ran_plain, busy)
        self.tokens += committed
        self.steps.append(ran_plain)
        return pace


@pytest.mark.parametrize(("drafting", "plain"), [(1.0, 2.5), (1.0, 1.3), (1.1, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("answer", [56, 112, 10_000_000])
def test_whichever_gives_tokens_faster_is_used(drafting, plain, answer):
    """answer: tokens in it; of 56 every step that drafts has a prompt in it, most of the plain ones none."""
    server = Server(Pacer(4, 8), drafting / 1e3, plain / 1e3, prompt=0.2e-3)

    def run(steps):
        prompts = 0
        for _ in range(steps):
            fresh = min(3, server.tokens // answer - prompts)
            prompts += fresh
            server.step(8, fresh=fresh)

    run(20 * LOOK)
    (contest,) = server.pacer.contests.values()
    assert contest.plain == (plain < drafting)
    if answer > 112:  # or prompts take their time
        before, began = server.tokens, server.now
        run(200 * LOOK)
        assert server.now - began < 1.03 * min(drafting, plain) / 1e3 * (server.tokens - before)


@pytest.mark.parametrize(("gain", "wanted"), [(0.99, True), (0.97, True), (0.93, False)])
def test_drafting_goes_on_only_where_it_gains(gain, wanted):
    """First tokens wait for bursts, which a few percent are not worth."""
    server = Server(Pacer(4, 8), drafting=gain * 1e-3, plain=1e-3)
    for _ in range(80 * LOOK):
        server.step(8)
    (contest,) = server.pacer.contests.values()
    assert contest.plain == wanted


def test_what_was_faster_may_change():
    server = Server(Pacer(4, 8), drafting=1e-3, plain=2e-3)
    for drafting, plain in ((1e-3, 2e-3), (2e-3, 1e-3), (1e-3, 2e-3)):
        server.drafting, server.plain = drafting, plain
        shares = set()
        for _ in range(200 * LOOK):
            server.step(8)
            shares.update(contest.share for contest in server.pacer.contests.values())
        assert server.pacer.plain == (plain < drafting)
        assert max(shares) == SHARE[0]  # a trial that speaks against what is in use: look again soon


def test_drafting_has_to_promise_more_than_a_little():
    """Among plain steps 3% is not enough, 10% is; among drafting ones plain steps need no more than to be faster."""
    server = Server(Pacer(4, 8), drafting=1e-3, plain=0.98e-3)
    for drafting, wanted in ((1e-3, True), (0.95e-3, True), (0.88e-3, False)):
        server.drafting = drafting
        for _ in range(200 * LOOK):
            server.step(8)
        (contest,) = server.pacer.contests.values()
        assert contest.plain == wanted


def test_batches_of_another_kind_have_their_own_contest():
    server = Server(Pacer(4, 8), 1e-3, 1e-3)
    for _ in range(30):
        for lanes, drawn, drafting in ((2, False, 0.5), (32, False, 0.7), (32, True, 3.0)):
            server.drafting = drafting / 1e3
            for _ in range(LOOK):
                server.step(lanes, drawn=drawn)
    plain = {kind: contest.plain for kind, contest in server.pacer.contests.items()}
    assert plain == {(2, False): False, (32, False): False, (32, True): True}


def test_seldom_long_steps_count_for_what_they_take():
    """Most drafting steps are faster than plain ones, every third so much slower that all of them together are, too."""
    server = Server(Pacer(4, 8), drafting=1e-3, plain=1e-3)
    for number in range(200 * LOOK):
        server.drafting = 1.6e-3 if number % 3 == 0 else 0.9e-3
        server.step(8)
    (contest,) = server.pacer.contests.values()
    assert contest.plain


def test_waiting_for_requests_takes_nobody_s_time():
    server = Server(Pacer(4, 8), drafting=1e-3, plain=2e-3)
    for number in range(8 * LOOK):
        last = number % 4 == 3
        server.step(8, fresh=8 if number % 4 == 0 else 0, busy=not last or number % 8 == 3)  # a client may hang up
        server.now += 1e6 * last
    (contest,) = server.pacer.contests.values()
    assert all(seconds < 1 for laps in contest.laps for seconds, _ in laps) and len(contest.laps[False])


def test_one_lucky_trial_is_not_enough():
    server = Server(Pacer(4, 8), drafting=2e-3, plain=1e-3)
    for _ in range(40 * LOOK):
        server.step(8)
    (contest,) = server.pacer.contests.values()
    assert contest.plain
    for lucky in (True, *[False] * TRIALS):
        trials = list(contest.scores)
        while list(contest.scores) == trials:
            server.drafting = 0.5e-3 * (1 + server.steps.count(False) % 7 / 100) if lucky else 2e-3
            server.step(8)
            assert contest.plain
        assert (contest.scores[-1] < 0) == lucky


def test_the_first_trials_of_plain_steps_are_not_far_apart():
    """They lose far more here than trials may later on, and what the first ones see may hold for the start only."""
    server = Server(Pacer(4, 8), drafting=1e-3, plain=3e-3)
    began: list[float] = []
    while len(began) < FEWEST + 1:
        plain = server.step(8).plain
        (contest,) = server.pacer.contests.values()
        if plain and contest.began not in began:
            began.append(contest.began)
    *early, later = (after - before for before, after in pairwise(began))
    assert len(early) == FEWEST - 1 and later > DOUBT / 2 * max(early)
    assert not contest.plain


def test_trials_that_do_not_agree_speak_for_plain_steps():
    server = Server(Pacer(4, 8), drafting=1e-3, plain=1e-3)
    trials: list[float] = []
    server.step(8)
    (contest,) = server.pacer.contests.values()
    while len(trials) < TRIALS:
        server.plain = 1.3e-3 if len(trials) % 2 == 0 else 1.0e-3
        server.step(8)
        trials = list(contest.scores)
    assert min(trials) < -0.2 and contest.plain


def test_a_machine_that_gets_slower_all_the_time_favours_none():
    """Every step takes 3% longer than the one before, for a while: what ran before is no measure of a trial."""
    server = Server(Pacer(4, 8), drafting=1.2e-3, plain=1e-3, burst=1)
    for number in range(200 * LOOK):
        slower = 1.03 ** (number % (2 * LOOK))
        server.drafting, server.plain = 1.2e-3 * slower, 1e-3 * slower
        server.step(8)
    (contest,) = server.pacer.contests.values()
    within = [0.1 < score < 0.3 for score in contest.scores]  # log 1.2 = 0.18
    assert contest.plain and len(within) == TRIALS and sum(within) > TRIALS / 2


def test_trials_lose_their_share_of_the_steps_time():
    """Of a server that waits for requests most of the time, too. Less and less while they all say the same."""
    server = Server(Pacer(4, 8), drafting=1.4e-3, plain=1e-3)
    for _ in range(10 * LOOK):
        server.step(8)
    (contest,) = server.pacer.contests.values()
    assert contest.share < SHARE[0]
    lost = worked = 0.0
    for number in range(400 * LOOK):
        before, tokens = server.now, server.tokens
        server.step(8, fresh=8 if number % 16 == 0 else 0, busy=number % 16 != 15)
        worked += server.now - before
        lost += server.now - before - 1e-3 * (server.tokens - tokens)
        server.now += 100.0 * (number % 16 == 15)
    assert 0 < lost < 3 * SHARE[1] * worked  # a trial itself does not see what the step that ends it throws away


def test_larger_batches_and_sampled_ones_begin_where_others_stand():
    server = Server(Pacer(4, 8), drafting=2e-3, plain=1e-3)
    for _ in range(4 * LOOK):
        server.step(8)
    assert server.step(16).plain and server.step(12).plain
    assert not server.step(4).plain and not server.step(4, drawn=True).plain
    assert server.step(16, drawn=True).plain and server.step(24, drawn=True).plain


@pytest.mark.parametrize(("lanes", "wanted"), [(1, False), (4, False), (32, True)])
def test_drafting_is_not_begun_where_passes_are_bound_by_computing(lanes, wanted):
    pacer = Pacer(4, 8)
    for rows in (1, 2, 4, 8, 16, 32, 64):  # flat up to 16 rows
        pacer.cost.learn(rows, max(16, rows) * 1e-4)
    server = Server(pacer, 1e-3, 1e-3)
    assert server.step(lanes).plain == wanted
    # Nor tried before its trial, of six steps with eight passes, is a small share of the time.
    (contest,) = server.pacer.contests.values()
    assert contest.rest == (pytest.approx(LAPS * 8 * lanes * 4 * 1e-4 / 2 / SHARE[0]) if wanted else 0)
    while wanted and contest.clock < 0.9 * contest.rest:
        assert server.step(lanes).plain


def test_a_trial_that_clearly_loses_is_short():
    """Two steps that are measured, the one before them, and the one that verifies drafts; six if it is close."""
    most = {}
    for plain in (1.2e-3, 2e-3):
        server = Server(Pacer(4, 8), drafting=1e-3, plain=plain)
        paces = [server.step(8).plain for _ in range(8 * LOOK)]
        runs = "".join("p" if one else " " for one in paces).split()
        most[plain] = max(map(len, runs))
    assert most[2e-3] <= 4 < LAPS < most[1.2e-3]


def test_no_plain_steps_where_something_is_fixed():
    for pacer in (Pacer(4, 8, fixed=1), Pacer(4, 8, contested=False)):
        server = Server(pacer, drafting=3e-3, plain=1e-3)
        assert not any(server.step(8).plain for _ in range(4 * LOOK))


def test_no_plain_steps_where_something_is_always_to_run_ahead():
    """Nor do such steps decide anything for the others."""
    server = Server(Pacer(4, 8), drafting=3e-3, plain=1e-3)
    for _ in range(4 * LOOK):
        assert not server.step(8, led=True).plain
    (contest,) = server.pacer.contests.values()
    assert not contest.plain and not contest.scores
    while not contest.plain:
        server.step(8)
    assert server.step(8).plain and not server.step(8, led=True).plain and server.step(8).plain


def test_steps_of_requests_that_are_not_drafted_for_are_plain():
    """All of them, in every run of such requests, and neither kind of batch decides anything for the other."""
    server = Server(Pacer(4, 8), drafting=1e-3, plain=3e-3)
    for _ in range(40):
        assert all(server.step(8, hurry=True, alone=True).plain for _ in range(10))
        for _ in range(10):
            server.step(8)
    (contest,) = server.pacer.contests.values()
    assert contest.scores and not contest.plain
    for fixed in (Pacer(4, 8, fixed=1), Pacer(4, 8, contested=False)):  # every other step drafts
        server = Server(fixed, drafting=3e-3, plain=1e-3)
        assert all(server.step(8, alone=True).plain and not server.step(8).plain for _ in range(40))
        assert not server.step(8, led=True, alone=True).plain
    mixed = Server(Pacer(4, 8), drafting=1e-3, plain=3e-3)
    for _ in range(400):
        mixed.step(8)
    (other,) = mixed.pacer.contests.values()
    assert contest.clock == pytest.approx(other.clock, rel=0.5)  # its own 400 steps', not those of the others


@pytest.mark.parametrize(("seconds", "bare"), [(1e-5, True), (1e-3, False)])
def test_rows_do_not_run_ahead_where_first_tokens_would_wait_for_them(seconds, bare):
    """Not where passes cost about the same with them, nobody waits, nobody else decodes, or all is fixed.

    Steps of cheap passes are bare then, of 1 or 2 ms; where a pass takes ten times what it takes beside the model and
    more, rows sit out.
    """
    waiting = Batch(4, prompts=6, fresh=1)
    for free, late in ((100, True), (200, False)):
        pacer = taught(lambda rows, free=free: (free + rows) * seconds)
        pace = pacer.begin(0.0, waiting)
        assert pace.entry < 2 and (pace.bare, pace.apart) == (late and bare, late and not bare)
        for batch in (
            waiting._replace(prompts=0, fresh=0),
            waiting._replace(lanes=1),
            waiting._replace(led=True),
            waiting._replace(prompts=1000),  # beside so many rows a few more are no matter
        ):
            pace = pacer.begin(0.0, batch)
            assert not pace.bare and not pace.apart
        pacer.contested = False
        pace = pacer.begin(0.0, waiting)
        assert not pace.bare and not pace.apart
    fixed = taught(lambda rows: (10 + rows) * seconds, fixed=1).begin(0.0, waiting)
    unknown = Pacer(4, 8).begin(0.0, waiting)  # nothing has run ahead yet
    alone = taught(lambda rows: (100 + rows) * seconds)
    for _ in range(LATEST):  # drafting steps in which requests had one row each in a pass
        alone.learn(StepReport(Counts(finished=1, rows=10, lane_passes=10), 0))
    for pace in (fixed, unknown, alone.begin(0.0, waiting)):
        assert not pace.bare and not pace.apart


def test_steps_in_which_rows_sat_out_say_nothing_of_how_many_run_ahead():
    pacer, waiting = taught(lambda rows: 0.1 + rows * 1e-3), Batch(4, prompts=6, fresh=1)
    for _ in range(2 * LATEST):
        assert pacer.begin(0.0, waiting).apart
        pacer.learn(StepReport(Counts(finished=1, rows=10, lane_passes=10), 0))


def test_trials_go_on_where_somebody_always_waits():
    """For whom nothing is drafted, among others: no step has a burst then."""
    for drafting, plain in ((1e-3, 2e-3), (2e-3, 1e-3)):
        server = Server(Pacer(4, 8), drafting, plain)
        for _ in range(80 * LOOK):
            server.step(8, hurry=True)
        (contest,) = server.pacer.contests.values()
        assert len(contest.scores) >= TRIALS // 2 and contest.plain == (plain < drafting)
        assert (sum(server.steps) > 0.9 * len(server.steps)) == (plain < drafting)
