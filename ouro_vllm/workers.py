"""Workers that put Ouro's model runner in place. Chosen in `hooks`, as vLLM's `worker_cls`."""

from typing import Any

from ouro_vllm.patches import expand_on_cpu
from ouro_vllm.plain import PlainDepths
from ouro_vllm.runner import SelfSpeculation


def install_runner(worker: Any) -> None:
    """Give the worker's V1 runner, just made and without a model yet, its Ouro methods.

    vLLM has no setting for the runner's class, and its CPU worker makes the runner in the middle of `init_device`
    (vllm/v1/worker/cpu_worker.py). The classes mixed in add methods only; their state starts here.
    """
    runner = worker.model_runner
    speculative = worker.vllm_config.speculative_config is not None
    mixin = SelfSpeculation if speculative else PlainDepths
    runner.__class__ = type(f"Ouro{type(runner).__name__}", (mixin, type(runner)), {})
    if speculative:
        expand_on_cpu()
        runner.start_speculation()
    else:
        runner.start_plain()


def _worker(base: type) -> type:
    def init_device(self: Any) -> None:
        base.init_device(self)
        if not self.use_v2_model_runner:
            install_runner(self)

    def compile_or_warm_up_model(self: Any) -> Any:
        times = base.compile_or_warm_up_model(self)
        if isinstance(self.model_runner, SelfSpeculation):
            self.model_runner.time_passes()
        return times

    methods = {"init_device": init_device, "compile_or_warm_up_model": compile_or_warm_up_model}
    return type("OuroWorker", (base,), {**methods, "__module__": __name__})


def __getattr__(name: str) -> type:
    """`OuroCPUWorker` and `OuroGPUWorker`, made when vLLM asks: importing the other platform's worker may fail."""
    if name == "OuroCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        return _worker(CPUWorker)
    if name == "OuroGPUWorker":
        from vllm.v1.worker.gpu_worker import Worker

        return _worker(Worker)
    raise AttributeError(name)
