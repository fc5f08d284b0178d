"""How the pace is chosen from what passes cost and how often early loops agree. No engine."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouro_vllm.wavefront.pacing import LATEST, LOOK, Pace, Pacer, PassCost, StepReport, bucket
from ouro_vllm.wavefront.waves import GUESSES, Counts

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def taught(cost, settled=(700, 200, 70, 30), guesses=(0, 0, 0), hits=(0, 0, 0), fixed=None) -> Pacer:
    """A pacer for 4 loops that has seen passes cost `cost(rows)` and rows settle so often by each loop.

    guesses, hits: in a thousand tokens, by place.
    """
    pacer = Pacer(4, 8, fixed)
    shapes = [(rows, cost(rows)) for rows in SIZES for _ in range(3)]
    looked = dict(guesses=list(guesses), hits=list(hits), looked=[1000] * GUESSES)
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
    assert Pacer(4, 8).decide(0, True) == Pace(0, 0)  # nothing known, nothing to decide


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
