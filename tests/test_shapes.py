"""Checkpoints of other shapes than the bundled one, and broken ones: through a real engine, float32."""

import os

import pytest
import torch
from checkpoints import edit, write
from reference import Reference

SHAPES = {
    "grouped": {"num_key_value_heads": 2},
    "one_pair": {"num_key_value_heads": 1, "num_hidden_layers": 1, "total_ut_steps": 5},
    "tied": {"tie_word_embeddings": True, "vocab_size": 97},
    "wide_heads": {"head_dim": 80, "hidden_size": 96, "intermediate_size": 50, "num_key_value_heads": 2},
    "new_rope": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "one_loop": {"total_ut_steps": 1},
    "as_published": {
        "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModelForCausalLM": "modeling_ouro.OuroModel"},
        "use_sliding_window": False,
        "max_window_layers": 2,
        "layer_types": ["full_attention", "full_attention"],
        "early_exit_threshold": 1.0,
    },
}


def start(engine, folder, **options):
    return engine(folder, skip_tokenizer_init=True, max_model_len=256, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape(engine, tmp_path, shape):
    from test_exactness import assert_greedy, greedy

    folder = write(tmp_path, seed=len(shape), **SHAPES[shape])
    vocabulary = SHAPES[shape].get("vocab_size", 163)
    generator = torch.Generator().manual_seed(1)
    asked = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (1, 2, 33, 129)]
    with start(engine, folder) as llm:
        answers = greedy(llm, asked, tokens=32)
    assert_greedy(Reference(folder), asked, answers)


def test_fewer_pairs_than_workers(engine, tmp_path, monkeypatch):
    """Tensor parallel 2 with a single key-value head, which both workers then hold."""
    from test_exactness import assert_greedy, greedy

    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed for two workers")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder, asked = write(tmp_path, num_key_value_heads=1), [[5], list(range(100))]
    with start(engine, folder, tensor_parallel_size=2) as llm:
        answers = greedy(llm, asked, tokens=32)
    assert_greedy(Reference(folder), asked, answers)


def test_a_head_of_its_own_beside_tied_embeddings_is_used(engine, tmp_path):
    from test_exactness import assert_greedy, greedy

    head = torch.randn(163, 128, generator=torch.Generator().manual_seed(7)) / 11
    folder, asked = edit(write(tmp_path, tie_word_embeddings=True), lm_head__weight=head), [[1, 2, 3]]
    with start(engine, folder) as llm:
        answers = greedy(llm, asked, tokens=32)
    assert_greedy(Reference(folder), asked, answers)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model__norm__weight": None}, "lacks 1 tensor.*`model.norm.weight`"),
        ({"model__early_exit_gate__bias": None}, "lacks 1 tensor.*`model.early_exit_gate.bias`"),
        ({"model__layers__2__mlp__up_proj__weight": torch.zeros(176, 128)}, "`model.layers.2.mlp.up_proj.weight`"),
        ({"model__layers__0__self_attn__q_proj__bias": torch.zeros(128)}, "`model.layers.0.self_attn.q_proj.bias`"),
        (
            {"model__layers__1__mlp__up_proj__weight": torch.zeros(176, 96)},
            r"\(176, 96\); config.json asks for \(176, 128\)",
        ),
    ],
)
def test_broken_checkpoint_is_refused_by_name(engine, tmp_path, change, named):
    from ouro_vllm.weights import CheckpointError

    folder = edit(write(tmp_path), **change)
    with pytest.raises(CheckpointError, match=named), start(engine, folder):
        pass


@pytest.mark.parametrize(
    ("options", "changes", "named"),
    [
        ({}, {"total_ut_steps": None}, "no `total_ut_steps`"),
        ({}, {"total_ut_steps": 0}, "`total_ut_steps` is 0"),
        ({}, {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({}, {"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
        ({"additional_config": {"ouro": {"max_loops": 17}}}, {}, "`ouro.max_loops` is 17.*1 to 16"),
        ({"additional_config": {"ouro": {"max_loop": 4}}}, {}, "unknown option `ouro.max_loop`.*`max_loops`"),
        ({"pipeline_parallel_size": 2}, {}, "--pipeline-parallel-size 2.*--tensor-parallel-size"),
        ({"kv_offloading_size": 1.0}, {}, "--kv-offloading-size.*without a connector"),
        ({"ubatch_size": 2}, {}, "--ubatch-size.*Start without"),
        ({"compilation_config": {"use_inductor_graph_partition": True}}, {}, "use_inductor_graph_partition.*unset"),
        ({}, {"total_ut_steps": 20}, "`total_ut_steps` is 20.*at most 16"),
        ({}, {"num_key_value_heads": 0}, "`num_key_value_heads` is 0"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            {},
            "--kv-transfer-config.*without a connector",
        ),
    ],
)
def test_wrong_setup_is_refused_before_weights_are_read(engine, tmp_path, options, changes, named):
    folder = write(tmp_path, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"(?s){named}"), start(engine, folder, **options):
        pass


def test_breakable_graphs_are_refused_and_never_chosen(engine, tmp_path, monkeypatch):
    from ouro_vllm.hooks import BREAKABLE_GRAPHS

    folder = write(tmp_path)
    monkeypatch.setenv(BREAKABLE_GRAPHS, "1")
    with pytest.raises(ValueError, match=f"{BREAKABLE_GRAPHS}.*Unset"), start(engine, folder):
        pass
    monkeypatch.delenv(BREAKABLE_GRAPHS)
    with start(engine, folder):
        assert os.environ[BREAKABLE_GRAPHS] == "0"
