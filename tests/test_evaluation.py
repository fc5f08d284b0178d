"""`ouro-vllm eval`: its forward against slow ones, its figures on a small scale, and what it refuses. No engine."""

import json
import math
import random
import re
from collections.abc import Iterator

import pytest
import torch
from checkpoints import edit, write
from conftest import CHECKPOINT, ROOT
from reference import Reference
from torch import Tensor

from ouro_vllm import cli
from ouro_vllm.evaluation import data, measure, report
from ouro_vllm.evaluation.forward import Cache, Looped, follow
from ouro_vllm.evaluation.policies import POLICIES, EvalError, Setting
from ouro_vllm.weights import CheckpointError

SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one_pair": {"num_key_value_heads": 1, "num_hidden_layers": 1, "total_ut_steps": 5},
    "tied": {"tie_word_embeddings": True, "vocab_size": 97},
    "wide_heads": {"head_dim": 80, "hidden_size": 96, "intermediate_size": 50, "num_key_value_heads": 2},
    "new_rope": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


class TokenByToken(Reference):
    """The policies once more, after their definition: one token, one loop, one position looked up at a time."""

    def __init__(self, folder, policy: str, window: int, block: int, prompt: int) -> None:
        super().__init__(folder)
        self.policy, self.window, self.block, self.prompt = policy, window, block, prompt
        self.loops = self.config["total_ut_steps"]
        self.kv: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}  # (loop, layer, position) -> its key and value

    def generate(self, ids: list[int]) -> Iterator[Tensor]:
        """-> logits [V] of the last loop, for every token."""
        for position, token in enumerate(ids):
            self.position = position
            x = self.w["model.embed_tokens.weight"][[token]]
            for loop in range(1, self.loops + 1):
                self.loop = loop
                for layer in range(self.config["num_hidden_layers"]):
                    x = self.layer(x, f"model.layers.{layer}.")
                x = self.norm(x, "model.norm.weight")
            head = "lm_head.weight" if "lm_head.weight" in self.w else "model.embed_tokens.weight"
            logits = x @ self.w[head].T
            yield logits[0]

    def attention(self, x: Tensor, name: str) -> Tensor:
        heads = self.config["num_attention_heads"]
        pairs = self.config.get("num_key_value_heads") or heads
        q, k, v = (
            (x @ self.w[f"{name}{part}_proj.weight"].T).view(1, n, -1)
            for part, n in (("q", heads), ("k", pairs), ("v", pairs))
        )
        self.kv[self.loop, name, self.position] = self.turned(k), v[0]
        q = self.turned(q)
        found = [self.looked_up(name, position) for position in range(self.position + 1)]
        out = []
        for head in range(heads):
            pair = head * pairs // heads
            score = torch.stack([key[pair] @ q[head] for key, _ in found]) / math.sqrt(q.shape[-1])
            out.append(sum(w * value[pair] for w, (_, value) in zip(score.softmax(0), found, strict=True)))
        return torch.cat(out)[None] @ self.w[name + "o_proj.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """Rotary position of the current token on [1, heads, size] -> [heads, size]."""
        return self.rotate(torch.cat([torch.zeros(self.position, *x.shape[1:]), x]))[-1]

    def looked_up(self, name: str, position: int) -> tuple[Tensor, Tensor]:
        """Key and value that the current row reads of an earlier position, or of its own."""
        own = self.kv[self.loop, name, position]
        if self.policy == "per_loop" or self.position < self.prompt:
            return own
        border = max(0, self.position - max(1, self.window) + 1)
        while border % self.block:
            border -= 1
        if position >= border:
            return own
        every = [self.kv[loop, name, position] for loop in range(1, self.loops + 1)]
        if self.policy == "average":
            return tuple(torch.stack(entries).mean(0) for entries in zip(*every, strict=True))
        return {"last": every[-1], "first": every[0]}[self.policy]


def fresh(vocabulary: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# The forward.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_prompts_are_the_references(tmp_path, shape, length):
    folder = write(tmp_path, seed=length, **SHAPES[shape])
    model, yardstick = Looped(folder), Reference(folder)
    ids = fresh(model.config.vocab_size, 3, length, seed=5)
    states = model.extend(ids, Cache(model.config, 3, length))
    assert len(states) == model.config.total_ut_steps
    for row in range(3):
        for state, depth in zip(states, yardstick.run(ids[row].tolist()), strict=True):
            assert (state[row] - depth.hidden).abs().max() < 1e-4
            assert (model.logits(state[row]) - depth.logits).abs().max() < 1e-4


def test_a_head_of_its_own_beside_tied_embeddings_is_used(tmp_path):
    head = torch.randn(163, 128, generator=torch.Generator().manual_seed(7)) / 11
    folder = edit(write(tmp_path, tie_word_embeddings=True), lm_head__weight=head)
    model = Looped(folder)
    hidden = model.extend(torch.tensor([[4, 9]]), Cache(model.config, 1, 2))[-1]
    assert (model.logits(hidden)[0] - Reference(folder).run([4, 9])[-1].logits).abs().max() < 1e-4


def test_prompts_in_pieces_are_the_same_prompts(tmp_path):
    model = Looped(write(tmp_path))
    ids = fresh(163, 2, 29, seed=1)
    whole = model.extend(ids, Cache(model.config, 2, 29))[-1]
    cache = Cache(model.config, 2, 29)
    pieces = [model.extend(ids[:, a:b], cache)[-1] for a, b in ((0, 1), (1, 12), (12, 29))]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["plain", "grouped", "one_pair"])
def test_every_policy_is_its_definition(tmp_path, policy, shape):
    folder = write(tmp_path, seed=11, **SHAPES[shape])
    model = Looped(folder)
    dice = random.Random(f"{policy} {shape}")
    for window, block in ((0, 1), (1, 1), (2, 1), (5, 1), (7, 4), (0, 3), (3, 8), (40, 1)):
        prompt, generated = dice.randint(1, 9), dice.randint(1, 14)
        ids = fresh(163, 2, prompt + generated, seed=dice.randrange(2**31))
        cache = Cache(model.config, *ids.shape)
        model.extend(ids[:, :prompt], cache)
        hidden = follow(model, ids, cache, prompt, Setting(policy, window, block))
        for row in range(2):
            slow = TokenByToken(folder, policy, window, block, prompt)
            right = torch.stack(list(slow.generate(ids[row].tolist())))[prompt:]
            assert (model.logits(hidden[row]) - right).abs().max() < 1e-4, (window, block, prompt, generated)


def test_a_cache_is_used_again_and_a_long_window_is_per_loop(tmp_path):
    """Settings one after the other on one cache, as the measurement runs them, leave nothing to the next."""
    model = Looped(write(tmp_path, seed=2))
    ids = fresh(163, 2, 31, seed=3)
    used = Cache(model.config, 2, 31)
    model.extend(ids[:, :13], used)
    base = follow(model, ids, used, 13, Setting("per_loop"))
    for policy in ("last", "average", "first", "last"):
        again = follow(model, ids, used, 13, Setting(policy, 4))
        new = Cache(model.config, 2, 31)
        model.extend(ids[:, :13], new)
        assert torch.equal(again, follow(model, ids, new, 13, Setting(policy, 4)))
        assert (again - base).abs().max() > 1e-3
        assert (follow(model, ids, used, 13, Setting(policy, 31)) - base).abs().max() < 1e-4
    assert (follow(model, ids, used, 13, Setting("per_loop")) - base).abs().max() < 1e-4


def test_rows_that_would_read_what_is_not_final_are_refused(tmp_path):
    model = Looped(write(tmp_path))
    cache = Cache(model.config, 1, 8)
    model.extend(torch.tensor([[1, 2, 3]]), cache)
    cache.rewind(3, "last")
    with pytest.raises(ValueError, match="position 6 reads shared KV up to 3, final only before 3"):
        model.extend(torch.tensor([[4, 5, 6, 7]]), cache, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("window", "block", "starts"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5]),
        (1, 1, [0, 1, 2, 3, 4, 5]),
        (3, 1, [0, 0, 0, 1, 2, 3]),
        (3, 2, [0, 0, 0, 0, 2, 2]),
        (0, 3, [0, 0, 0, 3, 3, 3]),
    ],
)
def test_window_starts(window, block, starts):
    assert [Setting("last", window, block).start(position) for position in range(6)] == starts
    assert [Setting("per_loop", window, block).start(position) for position in range(6)] == [0] * 6


# What is measured on.


def test_sums_are_the_model_cards():
    from evaluate import sum_prompts

    tokens = data.tokenizer(CHECKPOINT)
    for operators in (1, 4):
        prompts, answers = sum_prompts(tokens, operators)
        found = data.sums(tokens, operators, 40)
        assert [one.ids for one in found] == prompts[:40] and [one.answer for one in found] == answers[:40]
        for one in found:
            assert tokens.decode(one.ids[: one.prompt]).endswith("\n")
            assert tokens.decode(one.ids[one.prompt :]).count("\n") == 0
            assert len(one.ids) - one.prompt == 2 * operators + 2


def test_windows_are_spread_over_the_text():
    stream = list(range(101))
    assert data.windows(stream, 10, 10).tolist() == [stream[at : at + 11] for at in range(0, 100, 10)]
    assert data.windows(stream, 2, 10)[:, 0].tolist() == [0, 50]
    with pytest.raises(EvalError, match="holds 10 sequences of 10 tokens and 11 are asked for: lower --sequences"):
        data.windows(stream, 11, 10)


# The measurement.


@pytest.fixture(scope="module")
def small() -> dict:
    """Figures of the bundled checkpoint, few of everything."""
    plan = measure.Plan(CHECKPOINT, list(POLICIES), [0, 16], sequences=6, tokens=120, prompt=60, sums=8)
    return measure.measure(plan, lambda said: None)


def cost(figures: dict, policy: str, window: int) -> float:
    (found,) = (one for one in figures["settings"] if (one["policy"], one["window"]) == (policy, window))
    return found["cost"]["mean"]


def test_the_control_costs_most(small):
    assert [(one["policy"], one["window"]) for one in small["settings"]] == [
        ("per_loop", None),
        *((policy, window) for policy in ("last", "average", "first") for window in (0, 16)),
    ]
    for window in (0, 16):
        assert cost(small, "first", window) > cost(small, "last", window) > cost(small, "average", window) > 0
    assert cost(small, "first", 16) < cost(small, "first", 0)
    base, *shared = small["settings"]
    assert base["cost"]["mean"] == 0 and base["agreement"]["mean"] == 1
    assert all(0 < one["agreement"]["mean"] < 1 for one in shared)


def test_figures_are_those_of_the_reference(small, heldout):
    """Loss and accuracy of per_loop, computed once more without batches or a cache."""
    tokens, yardstick = data.tokenizer(CHECKPOINT), Reference(CHECKPOINT)
    base = small["settings"][0]
    stream = data.held_out(tokens)
    assert stream[1:101] == heldout[:100]
    losses = []
    for ids in data.windows(stream, 6, 120).tolist():
        logits = yardstick.run(ids[:-1])[-1].logits[60:]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[61:])).item())
    assert base["loss_by_sequence"] == pytest.approx(losses, abs=1e-4)
    assert base["loss"]["mean"] == pytest.approx(sum(losses) / 6, abs=1e-4)
    for row in base["sums"][1:3]:
        asked = data.sums(tokens, row["operators"], 8)
        right = [yardstick.run(one.ids)[-1].logits[-1].argmax() == one.answer for one in asked]
        assert row["accuracy"]["mean"] == pytest.approx(sum(right) / 8)


def test_means_and_errors():
    found = measure.mean(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert found == {"mean": 3.0, "error": pytest.approx((7 / 3) ** 0.5)}
    assert measure.mean(torch.tensor([2.0]))["error"] is None


def test_sequences_run_together_or_apart_measure_the_same(small, monkeypatch):
    monkeypatch.setattr(measure, "MOST_SEQUENCES", 4)
    plan = measure.Plan(CHECKPOINT, ["average"], [0], sequences=6, tokens=120, prompt=60, sums=0)
    apart = measure.measure(plan, lambda said: None)
    assert cost(apart, "average", 0) == pytest.approx(cost(small, "average", 0), abs=1e-5)


# The command.

QUICK = ["--sequences", "2", "--tokens", "40", "--prompt", "20", "--sums", "3", "--kv-sharing", "last,first"]


def test_the_command_writes_json_and_the_table_and_reports_it_anew(tmp_path, capsys):
    readme, saved = tmp_path / "README.md", tmp_path / "new" / "eval.json"
    readme.write_text("before\n<!-- eval -->\nold\n<!-- /eval -->\nafter\n")
    assert cli.main(["eval", *QUICK, "--kv-window", "8,0", "--json", str(saved), "--readme", str(readme)]) == 0
    printed = capsys.readouterr().out
    page = readme.read_text()
    assert page.startswith("before\n<!-- eval -->\n\nouro-tiny") and page.endswith("<!-- /eval -->\nafter\n")
    assert "old" not in page
    table = page.split("<!-- eval -->\n\n")[1].split("\n<!-- /eval -->")[0]
    assert table in printed
    rows = [line for line in table.splitlines() if re.match(r"\| (per_loop|last|first)", line)]
    assert [row.split(" | ")[:2] for row in rows[:5]] == [
        ["| per_loop", ""],
        ["| last", "0"],
        ["| last", "8"],
        ["| first (control)", "0"],
        ["| first (control)", "8"],
    ]
    assert "| last | 78.85 | 80.40 |" in table and "arXiv 2510.25741, Table 14" in table
    assert "Sharing is not lossless" in table
    written = json.loads(saved.read_text())
    assert written["sequences"] == 2 and len(written["settings"]) == 5 and written["sums"] == 3
    assert cli.main(["eval", "--from", str(saved)]) == 0
    assert capsys.readouterr().out.strip() == table.strip()


def test_a_text_of_ones_own_without_the_examples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "CORPUS", tmp_path / "none.py")
    data.corpus.cache_clear()
    try:
        own = tmp_path / "own.txt"
        own.write_text((ROOT / "README.md").read_text())
        assert cli.main(["eval", *QUICK, "--kv-window", "0", "--sums", "0", "--text", str(own)]) == 0
        printed = capsys.readouterr().out
        assert "of own.txt; the first 20" in printed and "operator" not in printed
        assert cli.main(["eval", *QUICK]) == 1
        assert "none.py is not there: install ouro-vllm from a checkout" in capsys.readouterr().err
    finally:
        data.corpus.cache_clear()


def test_a_control_that_does_not_cost_most_is_told(small):
    figures = json.loads(json.dumps(small))
    assert "`first` costs most, as it must" in report.text(figures)
    for one in figures["settings"]:
        one["cost"]["mean"] = 0.01
    assert "`first` does NOT cost most" in report.text(figures)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kv-sharing", "last,frist"], "unknown KV sharing policy 'frist': there are per_loop, last, average, first"),
        (["--kv-window=-1"], "'-1' is no whole number from 0 on"),
        (["--kv-window", "0,x"], "'x' is no whole number from 0 on"),
        (["--tokens", "0"], "'0' is no whole number from 1 on"),
    ],
)
def test_arguments_that_do_not_parse(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", *arguments])
    assert end.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "1"], "--tokens 1: name 2 or more"),
        (["--prompt", "512"], "--prompt 512: name 1 to 511, fewer than --tokens 512"),
        (["--tokens", "20000"], "--tokens 20000: the model has 16384 positions"),
        (["--sequences", "100000"], "sequences of 512 tokens and 100000 are asked for"),
        (["--text", "/none/such"], "/none/such cannot be read as text"),
        (["--readme", "/none/README.md"], "/none/README.md is not there"),
        (["/none/model"], "/none/model holds no config.json: name a checkpoint's folder"),
        (["--from", "/none/eval.json"], "/none/eval.json cannot be read as figures"),
    ],
)
def test_bad_input_is_one_line(arguments, named, capsys):
    assert cli.main(["eval", *arguments]) == 1
    errors = capsys.readouterr().err
    assert named in errors and errors.count("\n") == 1


def test_checkpoints_that_cannot_be_evaluated_are_named(tmp_path, capsys):
    def refused(name: str, **changes) -> str:
        folder = write(tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value}))
        (folder / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
        assert cli.main(["eval", str(folder)]) == 1
        return capsys.readouterr().err

    assert "single loop (`total_ut_steps` 1): there is no KV for loops to share" in refused("one", total_ut_steps=1)
    assert "no `total_ut_steps`" in refused("none", total_ut_steps=None)
    assert "field 'hidden_size'" in refused("typed", hidden_size="wide")
    assert "`rope_type` 'default' only" in refused(
        "rope", rope_theta=None, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    )
    assert "beyond `vocab_size` 163" in refused("small")
    folder = write(tmp_path / "no tokenizer")
    with pytest.raises(EvalError, match="holds no tokenizer.json"):
        data.tokenizer(folder)
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        Looped(edit(folder, model__norm__weight=None))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Looped(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no .*safetensors"):
        Looped(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: "):
        Looped(folder)
