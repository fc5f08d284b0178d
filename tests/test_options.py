"""Options, configuration and plugin entry: everything that needs no engine."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from checkpoints import CONFIG
from huggingface_hub.errors import StrictDataclassFieldValidationError

from ouro_vllm.config import OuroConfig, check
from ouro_vllm.hooks import refuse_old_vllm
from ouro_vllm.options import MOST_LOOPS, Depth, OptionError, OuroOptions, RequestOptions, refuse_depth, salt


def test_defaults_follow_the_checkpoint():
    for nothing in ({}, {"ouro": {}}, {"other": {"max_loops": 9}}, None):
        assert OuroOptions.parse(nothing, total_ut_steps=4) == OuroOptions(max_loops=4, fix_special_tokens=True)


def test_given_values_win():
    given = {"ouro": {"max_loops": MOST_LOOPS, "fix_special_tokens": False}}
    assert OuroOptions.parse(given, total_ut_steps=4) == OuroOptions(max_loops=MOST_LOOPS, fix_special_tokens=False)


@pytest.mark.parametrize("value", [0, -1, MOST_LOOPS + 1, "4", 4.0, True, None])
def test_wrong_max_loops_names_key_value_and_range(value):
    with pytest.raises(OptionError) as caught:
        OuroOptions.parse({"ouro": {"max_loops": value}}, total_ut_steps=4)
    for part in ("ouro.max_loops", repr(value), f"1 to {MOST_LOOPS}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_wrong_flag_is_refused(value):
    with pytest.raises(OptionError, match="ouro.fix_special_tokens.*true or false"):
        OuroOptions.parse({"ouro": {"fix_special_tokens": value}}, total_ut_steps=4)


@pytest.mark.parametrize("given", [[], "max_loops=3", 3])
def test_options_must_be_an_object(given):
    with pytest.raises(OptionError, match="must be an object"):
        OuroOptions.parse({"ouro": given}, total_ut_steps=4)


def test_unknown_option_suggests_the_near_one():
    with pytest.raises(OptionError, match="`ouro.maxloops`.*Did you mean `max_loops`.*Allowed: `max_loops`"):
        OuroOptions.parse({"ouro": {"maxloops": 3}}, total_ut_steps=4)


def test_config_fills_in_what_old_files_leave_out():
    config = OuroConfig(**{**CONFIG, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_key_value_heads, config.head_dim) == (4, 32)
    check(config)


def test_old_and_new_rotary_settings_read_the_same():
    old = OuroConfig(**{**CONFIG, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    new = OuroConfig(
        **{**CONFIG, "rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}
    )
    assert {k: old.rope_parameters[k] for k in ("rope_type", "factor", "rope_theta")} == {
        k: new.rope_parameters[k] for k in ("rope_type", "factor", "rope_theta")
    }


@pytest.mark.parametrize("loops", [0, -3, None])
def test_impossible_loop_counts_are_named(loops):
    with pytest.raises(ValueError, match="total_ut_steps"):
        check(OuroConfig(**{**CONFIG, "total_ut_steps": loops}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("total_ut_steps", 2.5), ("total_ut_steps", "4"), ("hidden_size", "wide"), ("rms_norm_eps", "x")],
)
def test_wrong_types_are_named(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'"):
        OuroConfig(**{**CONFIG, field: value})


def test_indivisible_heads_are_named():
    with pytest.raises(ValueError, match=r"`num_attention_heads` \(4\).*`num_key_value_heads` \(3\)"):
        check(OuroConfig(**{**CONFIG, "num_key_value_heads": 3}))


@pytest.mark.parametrize(
    ("parts", "refused"), [((0, 31, 2), True), ((0, 32, 0), False), ((1, 0), False), ((0, 0, "dev"), False)]
)
def test_old_vllm_is_refused(parts, refused):
    if refused:
        with pytest.raises(RuntimeError, match="0.31.2 is installed.*upgrade"):
            refuse_old_vllm(".".join(map(str, parts)), parts)
    else:
        refuse_old_vllm(".".join(map(str, parts)), parts)


def test_old_vllm_is_refused_before_anything_else_is_imported(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '0.11.0'; __version_tuple__ = (0, 11, 0)")
    done = subprocess.run(
        [sys.executable, "-c", "import ouro_vllm; ouro_vllm.register()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode and "RuntimeError: ouro-vllm needs vLLM 0.32 or newer; 0.11.0 is installed" in done.stderr


def fresh(code: str) -> dict:
    """Run code in a new interpreter; what it prints last is JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_entry_point_is_found_and_importing_it_is_light():
    seen = fresh(
        "import json, sys; from importlib.metadata import entry_points; "
        "(p,) = [p for p in entry_points(group='vllm.general_plugins') if p.name == 'ouro']; p.load(); "
        "print(json.dumps({'heavy': [m for m in ('torch', 'vllm', 'transformers') if m in sys.modules], "
        "'value': p.value}))"
    )
    assert seen == {"heavy": [], "value": "ouro_vllm:register"}


def test_registering_twice_is_the_same_as_once():
    seen = fresh(
        "import json, ouro_vllm; ouro_vllm.register(); ouro_vllm.register(); "
        "from vllm import ModelRegistry; from vllm.model_executor.models.config import MODELS_CONFIG_MAP; import sys; "
        "print(json.dumps({'known': 'OuroForCausalLM' in ModelRegistry.get_supported_archs(), "
        "'hook': MODELS_CONFIG_MAP['OuroForCausalLM'].__name__, 'model_loaded': 'ouro_vllm.model' in sys.modules}))"
    )
    assert seen == {"known": True, "hook": "OuroServerCheck", "model_loaded": False}


def test_options_read_the_same_from_the_command_line_and_from_yaml(tmp_path):
    seen = fresh(
        "import json, pathlib; from vllm.engine.arg_utils import EngineArgs; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
        f"f = pathlib.Path({str(tmp_path)!r}, 'c.yaml'); "
        "f.write_text('additional_config:\\n  ouro:\\n    max_loops: 3\\n'); "
        "parse = lambda *a: EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(a)).additional_config; "
        "print(json.dumps([parse('--additional-config', json.dumps({'ouro': {'max_loops': 3}})), "
        "parse('--config', str(f))]))"
    )
    assert seen == [{"ouro": {"max_loops": 3}}] * 2


SERVER = OuroOptions(max_loops=6)


@pytest.mark.parametrize(
    ("given", "depth"),
    [
        ({}, Depth(6)),
        ({"loops": 3}, Depth(3)),
        ({"loops": 6, "exit_threshold": 1}, Depth(6)),
        ({"exit_threshold": 0.5}, Depth(6, 0.5)),
        ({"loops": 4, "exit_threshold": 0.5, "min_loops": 2}, Depth(4, 0.5, 2)),
        ({"exit_threshold": "checkpoint"}, Depth(6, 0.9)),
    ],
)
def test_a_servers_depth(given, depth):
    assert OuroOptions.parse({"ouro": {"max_loops": 6, **given}}, 4, early_exit_threshold=0.9).depth == depth


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"loops": 5}, "`ouro.loops` is 5.*1 to 4"),
        ({"loops": 0}, "`ouro.loops` is 0"),
        ({"loops": True}, "`ouro.loops` is True"),
        ({"exit_threshold": 0}, "`ouro.exit_threshold` is 0;.*above 0"),
        ({"exit_threshold": 1.01}, "`ouro.exit_threshold` is 1.01"),
        ({"exit_threshold": "config"}, "`ouro.exit_threshold` is 'config'.*checkpoint"),
        ({"exit_threshold": "checkpoint"}, "`early_exit_threshold` of config.json is None"),
        ({"loops": 2, "min_loops": 3}, "`ouro.min_loops` is 3.*1 to 2"),
    ],
)
def test_a_servers_wrong_depth_is_named(given, named):
    with pytest.raises(OptionError, match=named):
        OuroOptions.parse({"ouro": given}, 4)


@pytest.mark.parametrize(
    ("asked", "server", "depth"),
    [
        ({}, SERVER, Depth(6)),
        ({"ouro_loops": 2}, SERVER, Depth(2)),
        ({"ouro_loops": 2}, OuroOptions(6, exit_threshold=0.3, min_loops=2), Depth(2)),
        ({"ouro_exit_threshold": 0.5}, SERVER, Depth(6, 0.5)),
        ({"ouro_exit_threshold": 1}, OuroOptions(6, exit_threshold=0.3), Depth(6, 1.0)),
        ({"ouro_exit_threshold": 0.5, "ouro_loops": 4}, SERVER, Depth(4, 0.5)),
        ({"ouro_exit_threshold": 0.5, "ouro_min_loops": 3}, SERVER, Depth(6, 0.5, 3)),
        ({"ouro_min_loops": 3}, OuroOptions(6, loops=4, exit_threshold=0.3), Depth(4, 0.3, 3)),
        ({"ouro_exit_threshold": 0.5, "ouro_loops": 2}, OuroOptions(6, min_loops=3), Depth(2, 0.5, 2)),
        ({}, OuroOptions(6, loops=4), Depth(4)),
        ({"other": 1, "ouro_speculate": 0}, SERVER, Depth(6)),
    ],
)
def test_a_requests_depth(asked, server, depth):
    assert RequestOptions.parse(asked).depth(server) == depth


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"ouro_loops": 7}, "`ouro_loops` is 7.*1 to 6"),
        ({"ouro_loops": 0}, "`ouro_loops` is 0"),
        ({"ouro_loops": "2"}, "`ouro_loops` is '2'"),
        ({"ouro_loops": 2.0}, "`ouro_loops` is 2.0"),
        ({"ouro_loops": None}, "`ouro_loops` is None"),
        ({"ouro_loops": True}, "`ouro_loops` is True"),
        ({"ouro_exit_threshold": 0.0}, "`ouro_exit_threshold` is 0.0"),
        ({"ouro_exit_threshold": 1.5}, "`ouro_exit_threshold` is 1.5"),
        ({"ouro_exit_threshold": "0.5"}, "`ouro_exit_threshold` is '0.5'"),
        ({"ouro_exit_threshold": float("nan")}, "`ouro_exit_threshold` is nan"),
        ({"ouro_min_loops": 0}, "`ouro_min_loops` is 0"),
        ({"ouro_min_loops": 7}, "`ouro_min_loops` is 7.*deepest loop is 6"),
        ({"ouro_min_loops": 3, "ouro_loops": 2, "ouro_exit_threshold": 0.5}, "`ouro_min_loops` is 3.*is 2"),
        ({"ouro_min_loops": 2, "ouro_loops": 3}, "`ouro_loops` alone is a fixed depth.*`ouro_min_loops` contradicts"),
        ({"ouro_lops": 2}, "unknown option `ouro_lops`.*Did you mean `ouro_loops`"),
    ],
)
def test_a_requests_wrong_depth_is_named(asked, named):
    with pytest.raises(OptionError, match=named):
        RequestOptions.parse(asked).depth(SERVER)


@pytest.mark.parametrize(
    ("worker", "v2", "named"),
    [
        ("ouro_vllm.workers.OuroCPUWorker", False, None),
        ("ouro_vllm.workers.OuroGPUWorker", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("vllm.v1.worker.gpu_worker.Worker", False, "without --worker-cls"),
    ],
)
def test_depth_is_refused_where_the_runner_is_not_ours(worker, v2, named):
    config = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker), use_v2_model_runner=v2)
    if named is None:
        refuse_depth(config)
    else:
        with pytest.raises(OptionError, match=named):
            refuse_depth(config)


def test_salts_tell_depths_apart_and_nothing_else():
    """A user's own salt stays what it is at full depth, unless it looks like one of ours."""
    assert salt(None, Depth(6), SERVER) is None
    assert salt("mine", Depth(6), SERVER) == "mine"
    assert salt("mine", Depth(6, 0.5, 2), SERVER) == "mine"
    given = [None, "mine", "ouro:2:", "ouro:2:mine"]
    salts = {salt(own, Depth(loops), SERVER) for own in given for loops in range(1, 7)}
    assert len(salts) == 4 * 6
    assert salt("mine", Depth(2, 0.5), SERVER) == salt("mine", Depth(2), SERVER)
