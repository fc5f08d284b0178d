"""What the log says of self-speculation. No engine; /metrics is read in test_server.py."""

from ouro_vllm.metrics import summary
from ouro_vllm.wavefront.waves import Counts


def test_one_line_says_what_passes_did_and_what_was_chosen():
    counts = Counts(passes=10, lane_passes=30, rows=120, agreed=[15, 18, 19, 20], judged=[20, 20, 20, 20])
    drafting = summary(counts, 20, entry=1, plain=False)
    assert "1.50 passes per token, 12.0 rows per pass, 6.00 per token" in drafting
    assert "earlier loops with the last 0.75, 0.90, 0.95, readouts fed from loop 1 on." in drafting
    plain = drafting.replace("readouts fed from loop 1 on", "steps are plain now")
    assert summary(counts, 20, entry=1, plain=True) == plain


def test_plain_steps_have_no_agreement_to_tell_of():
    line = summary(Counts(passes=40, lane_passes=80, rows=80), 20, entry=0, plain=True)
    assert "4.00 passes per token" in line and "agreement" not in line


def test_loops_without_readouts_have_a_dash():
    assert "the last -, 0.50, " in summary(Counts(agreed=[0, 1, 2], judged=[0, 2, 2]), 1, entry=2, plain=False)
