"""A widened checkpoint computes what its source computes: every depth's logits and gate, by the reference."""

import json

import pytest
import torch
from checkpoints import write
from conftest import CHECKPOINT
from reference import Reference

from ouro_vllm.cli import main
from ouro_vllm.config import OuroConfig
from ouro_vllm.weights import expected_shapes
from ouro_vllm.widen import Sizes, WidenError, widen

CASES = {
    "hidden": Sizes(hidden=512),
    "layers": Sizes(layers=5),
    "intermediate": Sizes(intermediate=251),
    "all": Sizes(hidden=256, layers=3, intermediate=300),
    "nothing": Sizes(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pairs", [4, 2])
def test_same_function(tmp_path, case, pairs):
    source = write(tmp_path / "source", seed=3, num_key_value_heads=pairs)
    config = widen(source, tmp_path / "target", CASES[case])
    ids = torch.randint(163, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    small, large = Reference(source), Reference(tmp_path / "target")
    assert {name: tuple(t.shape) for name, t in large.w.items()} == expected_shapes(OuroConfig(**config))
    for a, b in zip(small.run(ids), large.run(ids), strict=True):
        assert (a.logits - b.logits).abs().max() < 1e-4
        assert (a.exit_logit - b.exit_logit).abs().max() < 1e-4
        assert b.hidden.shape[1] == config["hidden_size"]


def test_the_bundled_checkpoint_widens_with_its_tokenizer(tmp_path, heldout):
    widen(CHECKPOINT, tmp_path / "big", Sizes(hidden=512, layers=4, intermediate=700))
    ids = heldout[:60]
    small, large = Reference(CHECKPOINT).run(ids)[-1], Reference(tmp_path / "big").run(ids)[-1]
    assert (small.logits - large.logits).abs().max() < 1e-3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "big" / name).read_bytes() == (CHECKPOINT / name).read_bytes()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (Sizes(hidden=384), "--hidden 384: must be 128 times 1, 2, 4"),
        (Sizes(hidden=64), "--hidden 64"),
        (Sizes(hidden=200), "--hidden 200"),
        (Sizes(layers=1), "--layers 1: must be at least the source's 2"),
        (Sizes(intermediate=100), "--intermediate 100: must be at least the source's 176"),
    ],
)
def test_impossible_sizes_are_named_and_nothing_is_written(tmp_path, sizes, named):
    with pytest.raises(WidenError, match=named):
        widen(write(tmp_path / "source"), tmp_path / "target", sizes)
    assert not (tmp_path / "target").exists()


def test_tied_embeddings_and_a_folder_in_use_are_refused(tmp_path):
    tied = write(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(WidenError, match="ties its embeddings"):
        widen(tied, tmp_path / "target", Sizes(hidden=256))
    with pytest.raises(WidenError, match="not an empty folder"):
        widen(tied, tied, Sizes())
    assert json.loads((tied / "config.json").read_text())["hidden_size"] == 128


def test_an_output_matrix_beside_tied_embeddings_is_kept(tmp_path):
    """vLLM unties such a checkpoint, and so does the larger one."""
    source = write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert widen(source, tmp_path / "target", Sizes(hidden=256))["tie_word_embeddings"] is False
    small, large = Reference(source).run([5, 9, 100]), Reference(tmp_path / "target").run([5, 9, 100])
    assert (small[-1].logits - large[-1].logits).abs().max() < 1e-4


def test_bad_input_is_one_line(tmp_path, capsys):
    source = write(tmp_path / "source")
    (tmp_path / "file").write_text("")
    cases = [
        (source, tmp_path / "file", "file is not an empty folder"),
        (tmp_path, tmp_path / "target", "no config.json"),
    ]
    (broken := write(tmp_path / "broken") / "model.safetensors").write_bytes(b"broken")
    cases.append((broken.parent, tmp_path / "target", "cannot be read"))
    for text in ("{", '{"hidden_size": "wide"}', "[]"):
        (tmp_path / text[:2]).mkdir()
        (tmp_path / text[:2] / "config.json").write_text(text)
        cases.append((tmp_path / text[:2], tmp_path / "target", "config.json: "))
    for folder, target, named in cases:
        assert main(["widen", str(folder), str(target)]) == 1
        errors = capsys.readouterr().err
        assert named in errors and errors.count("\n") == 1
