"""Servers that cannot self-speculate are refused with the setting and the mend, from the configuration alone."""

from random import Random
from types import SimpleNamespace

import pytest
from checkpoints import write
from vllm import SamplingParams

from ouro_vllm import SelfSpeculator
from ouro_vllm.options import Depth
from ouro_vllm.speculation import MOST_PASSES, SPECULATOR
from ouro_vllm.speculator import SelfSpeculator as Defined
from ouro_vllm.tally import Tally

SETTING = {"method": "custom_class", "model": SPECULATOR, "num_speculative_tokens": 8}


@pytest.fixture
def configured(tmp_path):
    """vLLM's configuration of a server for a checkpoint without weights: nothing can have been loaded."""

    def build(changes=None, speculative=None, **options):
        from vllm.engine.arg_utils import EngineArgs

        folder = write(tmp_path, **(changes or {}))
        (folder / "model.safetensors").unlink()
        given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
        speculative = {**SETTING, **(speculative or {})}
        return EngineArgs(
            model=str(folder), speculative_config=speculative, **{**given, **options}
        ).create_engine_config()

    return build


def test_what_works_gets_our_worker_and_scheduler(configured):
    config = configured(additional_config={"ouro": {"entry_loop": 2}})
    assert config.parallel_config.worker_cls.startswith("ouro_vllm.workers.Ouro")
    assert config.scheduler_config.scheduler_cls == "ouro_vllm.scheduler.OuroScheduler"
    assert not config.scheduler_config.async_scheduling


@pytest.mark.parametrize(("given", "most"), [({}, 330), ({"max_num_scheduled_tokens": 200}, 300)])
def test_passes_have_room_for_more_than_what_is_scheduled(configured, given, most):
    """By 2 R rows, here 6, for each of 5 requests."""
    scheduler = configured(max_num_batched_tokens=300, max_num_seqs=5, **given).scheduler_config
    assert scheduler.max_num_scheduled_tokens == given.get("max_num_scheduled_tokens", 300)
    assert scheduler.max_num_batched_tokens == most


@pytest.mark.parametrize("passes", [1, MOST_PASSES])
def test_the_ends_of_the_range_of_passes_are_in_it(configured, passes):
    assert configured(speculative={"num_speculative_tokens": passes}).num_speculative_tokens == passes


@pytest.mark.parametrize("loops", [2, 16])
def test_any_depth_from_two_loops_on(configured, loops):
    assert configured(additional_config={"ouro": {"max_loops": loops}}).speculative_config is not None


@pytest.mark.parametrize(
    ("speculative", "named"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens.*greater than 0"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens.*greater than 0"),
        ({"num_speculative_tokens": MOST_PASSES + 1}, "num_speculative_tokens.*from 1 to 128; got 129"),
        ({"num_speculative_tokens": 2.5}, "num_speculative_tokens.*integer"),
        ({"method": "ngram", "model": None, "prompt_lookup_max": 3}, f"method 'ngram'.*must be.*{SPECULATOR}"),
        (
            {"num_speculative_tokens_per_batch_size": [(1, 16, 8)]},
            "num_speculative_tokens_per_batch_size is not for Ouro.*Leave it out",
        ),
        ({"model": "some.other.Proposer"}, f"model 'some.other.Proposer'.*must be.*{SPECULATOR}"),
    ],
)
def test_speculative_config_that_makes_no_sense(configured, speculative, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        configured(speculative=speculative)


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({"total_ut_steps": 1}, {}, "no early loops.*Start without --speculative-config, or raise max_loops"),
        ({}, {"additional_config": {"ouro": {"max_loops": 1}}}, "no early loops.*raise max_loops"),
        ({}, {"additional_config": {"ouro": {"entry_loop": -1}}}, "`ouro.entry_loop` is -1.*0 to 3"),
        ({}, {"additional_config": {"ouro": {"entry_loop": 4}}}, "`ouro.entry_loop` is 4.*0 to 3"),
        ({}, {"additional_config": {"ouro": {"entry_loop": True}}}, "`ouro.entry_loop` is True.*0 to 3"),
        ({}, {"additional_config": {"ouro": {"entry_loop": 4, "max_loops": 3}}}, "`ouro.entry_loop` is 4.*0 to 3"),
        (
            {},
            {"additional_config": {"ouro": {"speculation": "ngram"}}},
            "`ouro.speculation` is 'ngram'.*\"draft-verify\"",
        ),
        ({}, {"additional_config": {"ouro": {"speculation": ["wavefront"]}}}, r"`ouro.speculation` is \['wavefront'\]"),
        (
            {},
            {"additional_config": {"ouro": {"kv_sharing": "last"}}, "disable_hybrid_kv_cache_manager": True},
            "--disable-hybrid-kv-cache-manager: KV sharing.*Start without",
        ),
        ({}, {"enable_lora": True}, "--enable-lora.*Start without one of the two"),
        ({}, {"enable_prompt_embeds": True}, "--enable-prompt-embeds.*Start without one of the two"),
        ({}, {"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype int8_per_token_head: .*Start without one of"),
        ({}, {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls 'vllm.v1.worker.*Start without"),
        ({}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls.*Start without"),
    ],
)
def test_setups_that_cannot_speculate(configured, changes, options, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        configured(changes, **options)


def test_scales_beside_a_shuffled_cache(configured, monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", "1")
    assert configured().speculative_config is not None
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8, VLLM_ROCM_SHUFFLE.*Start without one of the two"):
        configured(kv_cache_dtype="fp8")


def test_drafting_needs_no_hybrid_manager(configured):
    """One KV group is what plain decoding has, too."""
    assert configured(disable_hybrid_kv_cache_manager=True).scheduler_config.scheduler_cls.endswith("OuroScheduler")


def test_pipeline_parallel(configured):
    """vLLM looks at the drafter's model, which is this one, before it asks us, and says so in its own words."""
    with pytest.raises(NotImplementedError, match="Pipeline parallelism is not supported for this model"):
        configured(pipeline_parallel_size=2)


def test_vllms_other_runner(configured, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="self-speculation lives in vLLM's model runner V1.*Start with"):
        configured()


def test_contexts_in_pieces(configured):
    from ouro_vllm.speculation import check

    config = configured()
    config.scheduler_config.scheduler_cls, config.parallel_config.worker_cls = None, "auto"
    check(config, known_platform=True)
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ValueError, match="--decode-context-parallel-size: .*Start without one of the two"):
        check(config, known_platform=True)


def test_a_platform_without_our_worker(configured):
    from ouro_vllm.speculation import check

    with pytest.raises(ValueError, match="another platform.*Start without"):
        check(configured(), known_platform=False)


def test_another_model_is_no_ouro():
    assert SelfSpeculator is Defined
    config = SimpleNamespace(model_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    with pytest.raises(ValueError, match="drafts for OuroForCausalLM.*LlamaForCausalLM"):
        SelfSpeculator(config)


def test_another_runner_is_told_what_to_change():
    config = SimpleNamespace(model_config=SimpleNamespace(architectures=["OuroForCausalLM"]))
    with pytest.raises(RuntimeError, match="without --worker-cls.*VLLM_USE_V2_MODEL_RUNNER unset"):
        SelfSpeculator(config).propose()


def test_batches_that_are_not_looked_at_are_those_that_need_not_be():
    """`OuroScheduler._batch` remembers the step before; against one that never does, over random serving."""
    from ouro_vllm.scheduler import OuroScheduler

    def scheduler():
        made = OuroScheduler.__new__(OuroScheduler)
        made.requests, made.steady = {}, None
        return made

    chance, remembered, tally = Random(3), 0, Tally(Depth(4))
    swift = scheduler()
    for number in range(3000):
        requests = swift.requests
        if len(requests) < 4 and chance.random() < 0.2:
            params = SamplingParams(
                temperature=chance.choice([0.0, 0.7]),
                extra_args=chance.choice([None, None, {"ouro_speculate": 0}, {"ouro_anytime": 1}]),
            )
            requests[str(number)] = SimpleNamespace(
                sampling_params=params,
                prompt=chance.randint(1, 40),
                num_output_tokens=0,
                num_computed_tokens=0,
                ouro_depth=tally,
            )
        running = [name for name in requests if chance.random() < 0.97]
        for name in sorted(requests.keys() - running):  # preempted, or not in this step
            requests[name].num_computed_tokens *= chance.choice([0, 1])
        scheduled, drafts = {}, {}
        for name in running:
            request = requests[name]
            request.num_tokens = request.prompt + request.num_output_tokens
            ahead = request.num_tokens - request.num_computed_tokens
            scheduled[name] = min(ahead, chance.choice([1, 16, 64]))
            if ahead == 1 and number % 50 > 40 and chance.random() < 0.5:
                drafts[name] = [7] * chance.randint(1, 3)
                scheduled[name] += len(drafts[name])
            request.num_computed_tokens += scheduled[name]  # as vLLM does, drafts included
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            scheduled_spec_decode_tokens=drafts,
            total_num_scheduled_tokens=sum(scheduled.values()),
        )
        slow = scheduler()
        slow.requests, before = requests, swift.steady
        assert swift._batch(output) == slow._batch(output)
        remembered += before is not None and swift.steady is before
        for name in running:
            request = requests[name]
            if request.num_computed_tokens >= request.num_tokens:
                request.num_computed_tokens -= len(drafts.get(name, ()))
                request.num_output_tokens += 1
            if request.num_output_tokens > 30:
                del requests[name]
    assert remembered > 300
