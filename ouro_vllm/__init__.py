"""ouro-vllm: vLLM plugin for looped language models (ByteDance's Ouro, arXiv 2510.25741).

Importing this package loads nothing heavy; vLLM calls `register` in each of its processes.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point `ouro` in `vllm.general_plugins`: makes vLLM know Ouro. Safe to call any number of times.

    Raises:
        RuntimeError: the installed vLLM is older than supported.
    """
    from ouro_vllm.hooks import install

    install()


def __getattr__(name: str) -> type:
    """`SelfSpeculator`, the name users give to vLLM, without importing it here."""
    if name == "SelfSpeculator":
        from ouro_vllm.speculator import SelfSpeculator

        return SelfSpeculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
