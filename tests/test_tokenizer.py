"""Chat checkpoints that name one special token for everything: put right by default, left alone on request."""

import json
import logging
import shutil

import pytest
from conftest import CHECKPOINT

OPEN, CLOSE, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@pytest.fixture
def published(tmp_path):
    """The bundled tokenizer with the mistakes of the published Thinking checkpoints."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": END, "eos_token": END, "pad_token": END}))
    template = tmp_path / "chat_template.jinja"
    start = template.read_text().index("{%- if enable_thinking")
    text = template.read_text()
    stop = text.index("{%- endif -%}", start) + len("{%- endif -%}")
    template.write_text(text[:start] + text[stop:])
    return tmp_path


def load(folder, mode="ouro"):
    import ouro_vllm

    ouro_vllm.register()
    from vllm.tokenizers.registry import get_tokenizer

    return get_tokenizer(folder, tokenizer_mode=mode)


def render(tokenizer, **options):
    talk = [{"role": "user", "content": "hi"}]
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **options)


def test_wrong_tokens_are_put_right_with_one_line(published, caplog):
    logging.getLogger("vllm").addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "ouro_vllm.tokenizer")
    tokenizer = load(published)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    lines = [r.getMessage() for r in caplog.records if "put right" in r.getMessage()]
    assert len(lines) == 1 and CLOSE in lines[0] and "fix_special_tokens" in lines[0]


def test_enable_thinking_reaches_the_prompt(published):
    plain = f"{OPEN}user\nhi{CLOSE}\n{OPEN}assistant\n"
    for folder in (published, CHECKPOINT):
        tokenizer = load(folder)
        assert render(tokenizer) == plain
        assert render(tokenizer, enable_thinking=False) == plain
        assert render(tokenizer, enable_thinking=True) == plain + "<think>\n"


def test_the_files_own_tokens_stay_on_request(published):
    tokenizer = load(published, mode="hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)


def test_right_files_and_base_models_are_left_alone(published):
    from ouro_vllm.tokenizer import corrections

    assert corrections(load(CHECKPOINT)) == {}
    (published / "chat_template.jinja").unlink()
    assert load(published).eos_token == END


def test_a_server_puts_them_right_by_default_and_stops_there(engine, published):
    """The whole way: the config hook chooses the tokenizer, and an answer ends at the chat's own end mark."""
    from vllm import SamplingParams

    shutil.copy(CHECKPOINT / "model.safetensors", published)
    (published / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    talk = [{"role": "user", "content": "Evaluate modulo 5: + 3 4"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    for option, mode, eos in (({}, "ouro", 2), ({"ouro": {"fix_special_tokens": False}}, "auto", 0)):
        with engine(published, additional_config=option) as llm:
            assert llm.llm_engine.model_config.tokenizer_mode == mode
            assert llm.get_tokenizer().eos_token_id == eos
            answer = llm.chat(talk, params, use_tqdm=False)[0].outputs[0]
        assert (answer.token_ids[-1] == 2 and answer.finish_reason == "stop") == (eos == 2)


def test_plain_text_is_encoded_the_same(published):
    assert load(published).encode("def f(x):\n    return x") == load(CHECKPOINT).encode("def f(x):\n    return x")
