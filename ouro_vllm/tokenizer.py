"""The tokenizer of an Ouro checkpoint, with the special tokens of its chat format put right.

The published Thinking checkpoints name `<|endoftext|>` (0) as bos, eos and pad, while their chats open with
`<|im_start|>` (1) and close with `<|im_end|>` (2): a server that believes the file never stops at the end of an answer.
Their template also does not know `enable_thinking`, though the model must see `<think>` in the prompt to think.
"""

import multiprocessing
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.tokenizers.hf import CachedHfTokenizer, HfTokenizer
from vllm.tokenizers.protocol import TokenizerLike

logger = init_logger(__name__)

OPEN, CLOSE, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking -%}"
    "{{- '<think>\\n' -}}"
    "{%- endif -%}"
)


class OuroTokenizer(TokenizerLike):
    """`--tokenizer-mode ouro`, which the config hook chooses: vLLM's Hugging Face tokenizer, with `corrections`."""

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *args: Any, **kwargs: Any) -> HfTokenizer:
        """As `CachedHfTokenizer.from_pretrained` (vllm/tokenizers/hf.py)."""
        tokenizer = CachedHfTokenizer.from_pretrained(path_or_repo_id, *args, **kwargs)
        changed = corrections(tokenizer)
        if not changed:
            return tokenizer
        if multiprocessing.parent_process() is None:
            logger.info(
                "Special tokens of %s put right: bos %s, eos %s, pad %s, <think> on enable_thinking "
                '(keep the file\'s own with --additional-config \'{"ouro": {"fix_special_tokens": false}}\').',
                path_or_repo_id,
                OPEN,
                CLOSE,
                END,
            )
        return CachedHfTokenizer.from_pretrained(path_or_repo_id, *args, **{**kwargs, **changed})


def corrections(tokenizer: Any) -> dict[str, str]:
    """What to load a tokenizer with instead of what its files say; empty where the files are right.

    Wrong is a chat tokenizer whose bos, eos and pad are all END although it knows OPEN and CLOSE.
    """
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    if named != {END} or not tokenizer.chat_template or not {OPEN, CLOSE} <= tokenizer.get_vocab().keys():
        return {}
    changed = {"bos_token": OPEN, "eos_token": CLOSE, "pad_token": END}
    template = tokenizer.chat_template
    if isinstance(template, str) and "enable_thinking" not in template:
        changed["chat_template"] = template + THINK
    return changed
