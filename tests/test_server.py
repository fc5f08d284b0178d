"""A real server on a real port, started by `ouro-vllm serve`, spoken to with the `openai` client. Float32."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests
from conftest import CHECKPOINT, MODEL, until
from reference import Reference

PROMPT = "import os\nimport sys\n\n\ndef main(argv):\n"
SUM = [{"role": "user", "content": "Evaluate modulo 5: + 3 4"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    made = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)
    complete(made)  # the first request makes the metrics
    return made


def complete(client: openai.OpenAI, prompt: str | list[int] = PROMPT, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 48, **options})


def gauge(server: str, name: str, loop: int | None = None) -> float:
    """A metric that must be there, summed over its labels, or of this loop."""
    lines = requests.get(f"{server}/metrics", timeout=10).text.splitlines()
    wanted = "" if loop is None else f'loop="{loop}"'
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and wanted in line]
    assert values, f"no {name} in /metrics"
    return sum(values)


def token_ids(choice) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]


def test_completion_is_the_references(client, reference):
    from test_exactness import assert_greedy
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    bare = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    choice = complete(client, logprobs=1, max_tokens=64, extra_body=bare).choices[0]
    answer = token_ids(choice)
    assert len(answer) == 64
    assert_greedy(reference, [tokenizer.encode(PROMPT).ids], [answer])
    assert choice.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert choice.finish_reason == "length"


def test_streamed_completion_is_the_same_text(client):
    whole = complete(client)
    parts = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_chat_streamed_and_not(client):
    whole = client.chat.completions.create(model=MODEL, messages=SUM, temperature=0, max_tokens=20)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.strip() in list("01234")
    parts = client.chat.completions.create(model=MODEL, messages=SUM, temperature=0, max_tokens=20, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content


def test_thinking_is_put_into_the_prompt(client):
    lengths = [
        client.chat.completions.create(
            model=MODEL, messages=SUM, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": on}}
        ).usage.prompt_tokens
        for on in (False, True)
    ]
    assert lengths[1] - lengths[0] == 2  # `<think>` and a line end


def test_logprobs_are_the_references(client, reference: Reference):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(PROMPT).ids
    choice = complete(client, ids, logprobs=5, max_tokens=4, extra_body={"return_tokens_as_token_ids": True}).choices[0]
    answer = token_ids(choice)
    wanted = reference.run(ids + answer[:-1])[-1].logits.log_softmax(-1)[len(ids) - 1 :]
    for row, token, value, top in zip(
        wanted, answer, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert value == pytest.approx(float(row[token]), abs=1e-3)
        best = {f"token_id:{i}": float(row[i]) for i in row.topk(5).indices.tolist()}
        assert {name: pytest.approx(v, abs=1e-3) for name, v in best.items()} == top


def test_stop_string_ends_the_answer_and_stays_out_of_it(client):
    text = complete(client).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    choice = complete(client, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == text[: text.index(stop)]


def test_two_choices(client):
    both = complete(client, n=2, temperature=1, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text != both.choices[1].text
    again = complete(client, n=2, temperature=1, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in both.choices]


def test_json_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model=MODEL, messages=SUM, max_tokens=120, temperature=1, seed=seed, response_format=form
        )
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"name", "size"} and isinstance(value["name"], str) and 0 <= value["size"] <= 99


def test_metrics_of_self_speculation(server, client):
    """A request more is so many tokens more; early loops agree with the last one often; drafts are accepted."""
    names = ["tokens_total", "passes_total", "request_passes_total", "rows_total", "pass_seconds_total"]
    before = [gauge(server, f"vllm:ouro_{name}") for name in names]
    drafts = [f"vllm:spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted")]
    drafted, accepted = (gauge(server, name) for name in drafts)
    complete(client, max_tokens=64, extra_body={"ignore_eos": True})
    until(lambda: gauge(server, "vllm:ouro_tokens_total") >= before[0] + 64, 30)
    after = [gauge(server, f"vllm:ouro_{name}") for name in names]
    tokens, passes, request_passes, rows, seconds = (new - old for new, old in zip(after, before, strict=True))
    assert tokens == 64
    assert 0 < passes == request_passes < 4 * 64  # alone in the batch, and fewer than plain decoding's
    assert rows >= 4 * 63 and seconds > 0
    drafted, accepted = gauge(server, drafts[0]) - drafted, gauge(server, drafts[1]) - accepted
    assert drafted > 20 and accepted > 0.95 * drafted
    judged, agreed = (
        [gauge(server, f"vllm:ouro_readouts{what}_total", loop) for loop in range(1, 5)] for what in ("", "_agreed")
    )
    assert all(0 < some < of_all for some, of_all in zip(agreed[:3], judged[:3], strict=True))
    assert agreed[3] == judged[3] > 0
    assert gauge(server, "vllm:ouro_restarts_total") > 0 and gauge(server, "vllm:ouro_rows_dropped_total") > 0
    assert gauge(server, "vllm:ouro_drafting") in (0, 1) and 0 <= gauge(server, "vllm:ouro_entry_loop") <= 4


def test_drafting_can_be_switched_off_for_a_request(server, client):
    options = {"max_tokens": 32, "extra_body": {"ignore_eos": True, "vllm_xargs": {"ouro_speculate": 0}}}
    before = gauge(server, "vllm:ouro_request_passes_total")
    tokens = gauge(server, "vllm:ouro_tokens_total")
    text = complete(client, **options).choices[0].text
    until(lambda: gauge(server, "vllm:ouro_tokens_total") >= tokens + 32, 30)
    assert gauge(server, "vllm:ouro_request_passes_total") - before == 4 * 32  # R passes for every token
    assert gauge(server, "vllm:ouro_drafting") == 0
    options["extra_body"]["vllm_xargs"]["ouro_speculate"] = 1
    assert complete(client, **options).choices[0].text == text
    options["extra_body"]["vllm_xargs"] = {"ouro_exit_threshold": 0.9}  # for these rows are always to run ahead
    complete(client, **options)
    until(lambda: gauge(server, "vllm:ouro_drafting") == 1, 30)


def test_a_client_that_hangs_up_frees_its_request(server, client):
    before = complete(client).choices[0].text
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3500, "stream": True, "ignore_eos": True}
    with requests.post(f"{server}/v1/completions", json=body, stream=True, timeout=60) as stream:
        next(stream.iter_lines())
        until(lambda: gauge(server, "vllm:num_requests_running") == 1, 60)
    until(lambda: gauge(server, "vllm:num_requests_running") == 0, 60)
    until(lambda: gauge(server, "vllm:ouro_rows_in_flight") == 0, 30)
    assert complete(client).choices[0].text == before


def test_two_thousand_requests_leave_nothing_behind(server, client, heldout):
    """Greedy, sampled, seeded, not drafted for, hung up on: all is free again, and the server has not grown."""
    rng = random.Random(7)
    kinds = [{}, {"temperature": 0.7}, {"temperature": 1, "seed": 5}]
    kinds += [{"extra_body": {"vllm_xargs": {"ouro_speculate": 0}}}, {"stream": True}]

    def ask(number: int) -> None:
        """Sixteen prompts in one call: so many requests to the engine."""
        starts = [rng.randrange(len(heldout) - 64) for _ in range(16)]
        asked = [heldout[start : start + rng.randint(1, 16)] for start in starts]
        answer = complete(client, asked, **{"max_tokens": rng.randint(1, 8), **kinds[number % len(kinds)]})
        if "stream" in kinds[number % len(kinds)]:
            answer.close()

    def memory() -> int:
        """Bytes of the server's processes once it is idle. Without workers, which grow as blocks and batch sizes are
        used for the first time; what ours holds is looked at in test_many_requests_leave_nothing_behind."""
        until(lambda: gauge(server, "vllm:num_requests_running") == 0, 60)
        until(lambda: gauge(server, "vllm:ouro_rows_in_flight") == 0, 30)
        assert gauge(server, "vllm:kv_cache_usage_perc") == 0
        processes = psutil.Process().children(recursive=True)
        return sum(one.memory_info().rss for one in processes if not one.name().startswith("VLLM::Worker"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(25)))
        before = memory()
        list(pool.map(ask, range(100)))
    assert memory() - before < 1600 * 4096


def test_thirty_two_requests_at_once(client, heldout):
    asked = [heldout[start * 50 : start * 50 + 5 + 4 * start] for start in range(32)]
    alone = [complete(client, ids, max_tokens=24).choices[0].text for ids in asked]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda ids: complete(client, ids, max_tokens=24).choices[0].text, asked))
    assert together == alone


def test_metrics_of_depth(server, client):
    """Tokens by the loop they were read after, as the requests asked for it."""
    depth = "vllm:ouro_exit_depth"
    names = [f"{depth}_count", f"{depth}_sum"]
    before = [gauge(server, name) for name in names]
    for loops in (1, 3):
        options = {"max_tokens": 20, "extra_body": {"ignore_eos": True, "vllm_xargs": {"ouro_loops": loops}}}
        client.completions.create(model=MODEL, prompt=PROMPT, **options)
    until(lambda: gauge(server, names[0]) >= before[0] + 40, 30)
    after = [gauge(server, name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [40, 20 * 1 + 20 * 3]
    assert gauge(server, "vllm:ouro_mean_depth") == pytest.approx(after[1] / after[0])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"max_tokens": -5}, openai.BadRequestError, "max_tokens"),
        ({"prompt": [5] * 100_000}, openai.BadRequestError, "4096"),
        ({"prompt": [5, 999_999]}, openai.BadRequestError, "999999|out of vocabulary"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"vllm_xargs": {"ouro_speculate": 2}}}, openai.BadRequestError, "`ouro_speculate` is 2"),
        ({"extra_body": {"vllm_xargs": {"ouro_depth": 2}}}, openai.BadRequestError, "unknown option `ouro_depth`"),
        ({"extra_body": {"vllm_xargs": {"ouro_loops": 5}}}, openai.BadRequestError, "`ouro_loops` is 5"),
        ({"extra_body": {"vllm_xargs": {"ouro_exit_threshold": 2}}}, openai.BadRequestError, "`ouro_exit_threshold`"),
        (
            {"extra_body": {"vllm_xargs": {"ouro_draft": [2048]}}},
            openai.BadRequestError,
            "`ouro_draft` names token 2048",
        ),
        ({"logit_bias": {"5": 3}}, openai.BadRequestError, "logit_bias"),
    ],
)
def test_bad_requests_get_a_clear_error_and_harm_nobody(client, change, error, named):
    before = complete(client).choices[0].text
    with pytest.raises(error, match=named):
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, "max_tokens": 8, **change})
    assert complete(client).choices[0].text == before
