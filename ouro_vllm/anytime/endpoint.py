"""Routes: POST /v1/anytime/completions, POST /v1/anytime/chat/completions, and the page at GET /anytime.

An endpoint plugin (vllm/plugins/endpoint_plugins/interface.py), entry point `ouro`, loaded where VLLM_PLUGINS names it.
Requests go through vLLM's own OpenAI serving classes up to the engine: the same parsing, checks, chat templates and
sampling parameters. Only what is made of the outputs differs. Routes under /v1 are behind the server's API key
(vllm/entrypoints/serve/middleware/authenticate.py); the page is a static file and asks for it.
"""

import asyncio
import copy
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.logger import init_logger
from vllm.outputs import RequestOutput

from ouro_vllm.anytime import protocol
from ouro_vllm.anytime.protocol import AnytimeOptions, Event
from ouro_vllm.anytime.transcript import Transcript
from ouro_vllm.names import ARCHITECTURE, PLUGIN
from ouro_vllm.options import OptionError, OuroOptions, RequestOptions

logger = init_logger(f"vllm.{PLUGIN}.anytime")

PAGE = Path(__file__).with_name("page.html")
DEADLINE = "deadline"
# Depth options that do not hold for the draft, which has a depth of its own.
OF_ANSWER = ("ouro_exit_threshold", "ouro_min_loops")
DRAFT_DEPTH = 1


class AnytimeCompletionRequest(CompletionRequest):
    """vLLM's request with `anytime`, see `protocol`."""

    anytime: Any = None


class AnytimeChatRequest(ChatCompletionRequest):
    """vLLM's request with `anytime`, see `protocol`."""

    anytime: Any = None


class RawCompletion(OpenAIServingCompletion):
    """vLLM's serving, whose streams are the engine's outputs as they are."""

    async def completion_stream_generator(
        self, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(result_generator):
            async for _, output in result_generator:
                yield output

    async def ask(self, request: Any, raw_request: Request) -> Any:
        """Outputs of the engine, or vLLM's refusal."""
        return await self.create_completion(request, raw_request)


class RawChat(OpenAIServingChat):
    """vLLM's serving, whose streams are the engine's outputs as they are."""

    async def chat_completion_stream_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(result_generator):
            async for output in result_generator:
                yield output

    async def ask(self, request: Any, raw_request: Request) -> Any:
        """Outputs of the engine, or vLLM's refusal."""
        return await self.create_chat_completion(request, raw_request)


@dataclass
class Services:
    """What the routes speak to; kept in the app's state. server: its options, None if its model is not ours."""

    completion: RawCompletion
    chat: RawChat
    server: OuroOptions | None


class Refused(Exception):
    """vLLM's serving answered with an error before the engine was asked."""

    def __init__(self, response: ErrorResponse) -> None:
        super().__init__(response.error.message)
        self.response = response


class AnytimeEndpoints:
    """What the entry point makes; satisfies vLLM's `EndpointPlugin`."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Take over vLLM's serving objects, with their settings."""
        services = []
        for made, kind in ((state.openai_serving_completion, RawCompletion), (state.openai_serving_chat, RawChat)):
            raw = copy.copy(made)
            raw.__class__ = kind
            services.append(raw)
        config = engine_client.vllm_config
        ours = ARCHITECTURE in config.model_config.architectures
        state.ouro_anytime = Services(*services, OuroOptions.of(config) if ours else None)


router = APIRouter()


@router.post("/v1/anytime/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation
@load_aware_call
async def create_completion(request: AnytimeCompletionRequest, raw_request: Request) -> Response:
    """A completion as it forms."""
    return await respond(raw_request.app.state.ouro_anytime.completion, request, raw_request)


@router.post("/v1/anytime/chat/completions", dependencies=[Depends(validate_json_request)])
@with_cancellation
@load_aware_call
async def create_chat_completion(request: AnytimeChatRequest, raw_request: Request) -> Response:
    """A chat's answer as it forms."""
    return await respond(raw_request.app.state.ouro_anytime.chat, request, raw_request)


@router.get("/anytime", include_in_schema=False)
async def page() -> Response:
    """A page to watch answers form."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


async def respond(service: Any, request: Any, raw_request: Request) -> Response:
    """The stream of events; refusals come as an HTTP status, so nothing is sent before the first event is there.

    Raises:
        VLLMValidationError: an option that cannot be used; vLLM answers with 400.
    """
    options = checked(request, raw_request.app.state.ouro_anytime.server)
    stream = told(service, request, raw_request, options)
    try:
        first = await anext(stream)
    except Refused as refused:
        return JSONResponse(refused.response.model_dump(), status_code=refused.response.error.code)
    interval = float(getattr(raw_request.app.state.args, "sse_keep_alive_interval", 0))
    body = with_sse_keep_alive(written(first, stream), interval)
    # Proxies that buffer would make one block of it.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body, media_type="text/event-stream", headers=headers)


def checked(request: Any, server: OuroOptions | None) -> AnytimeOptions:
    """The request's options. Raises VLLMValidationError, naming the field, for what has no anytime form.

    server: see `Services`.
    """
    try:
        options = AnytimeOptions.parse(request.anytime)
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter="anytime") from error
    for field, given, why in (
        ("n", (request.n or 1) != 1, "one answer forms at a time: send n = 1"),
        ("prompt", prompts(request) > 1, "one answer forms at a time: send one prompt"),
        ("use_beam_search", request.use_beam_search, "beams have no committed prefix"),
        ("echo", request.echo, "only the answer is streamed"),
        ("logprobs", request.logprobs, "events carry none; `anytime.trace` sends probabilities by depth"),
        ("prompt_logprobs", request.prompt_logprobs, "events carry none"),
        (
            "tools",
            getattr(request, "tools", None),
            "text is streamed as the model writes it, tool calls are not parsed",
        ),
    ):
        if given:
            raise VLLMValidationError(f"`{field}` is not for anytime endpoints: {why}.", parameter=field)
    xargs = request.vllm_xargs or {}
    for field in ("ouro_anytime", "ouro_draft"):
        if field in xargs:
            raise VLLMValidationError(f"vllm_xargs: `{field}` is set by this endpoint itself.", parameter="vllm_xargs")
    if server is not None:
        check_depths(xargs, options, server)
    return options


def prompts(request: Any) -> int:
    """How many prompts a completion has (a chat has none of these): texts or token ids, and embeddings."""
    count = 0
    for given in (getattr(request, "prompt", None), getattr(request, "prompt_embeds", None)):
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        count += len(given) if several else given is not None
    return count


def check_depths(xargs: dict[str, Any], options: AnytimeOptions, server: OuroOptions) -> None:
    """Raises VLLMValidationError for what the engine would refuse, behind a draft in the middle of the stream."""
    try:
        RequestOptions.parse(xargs).depth(server)
    except OptionError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    if options.mode == "progressive":
        try:
            RequestOptions.parse(of_draft(xargs)).depth(server)
        except OptionError as error:
            why = f'`anytime.mode` "progressive" begins with a draft at depth {DRAFT_DEPTH}. {error}'
            raise VLLMValidationError(why, parameter="anytime") from error


async def written(first: list[Event], rest: AsyncIterator[list[Event]]) -> AsyncGenerator[str, None]:
    """Events on the wire, those that belong together in one write."""
    try:
        yield "".join(map(protocol.encoded, first))
        async with aclosing(rest):
            async for events in rest:
                yield "".join(map(protocol.encoded, events))
    except Exception as error:
        if not isinstance(error, GenerationError):
            logger.exception("An anytime stream failed.")
        info = create_error_response(error).error
        yield protocol.encoded(protocol.error(info.message, info.type, info.code))
    yield protocol.END


async def told(
    service: Any, request: Any, raw_request: Request, options: AnytimeOptions
) -> AsyncGenerator[list[Event], None]:
    """Events of one request, in batches that belong together; the last batch ends in `done`.

    Raises:
        Refused: before the first batch.
    """
    ends = asyncio.get_running_loop().time() + options.deadline_ms / 1000 if options.deadline_ms else None
    outputs = partial(until, ends, service, raw_request)
    asked = {**(request.vllm_xargs or {}), "ouro_anytime": 1 + options.trace}
    request = request.model_copy(update={"stream": True, "vllm_xargs": asked})
    transcript: Transcript | None = None
    reason: str | None = None
    if options.mode == "progressive":
        if request.seed is None:
            # Draft and answer draw the same noise, so that they differ only where the depths do.
            request = request.model_copy(update={"seed": secrets.randbits(62)})
        async with aclosing(outputs(drafted(request))) as stream:
            async for output in stream:
                transcript = transcript or opened(service, request, output, options)
                new = output.outputs[0]
                if events := transcript.drafted(new.token_ids, new.text, DRAFT_DEPTH, output.finished):
                    yield events
                reason = new.finish_reason
        if reason is not None:
            request = request.model_copy(update={"vllm_xargs": {**asked, "ouro_draft": list(transcript.draft)}})
    if options.mode == "tail" or reason is not None:
        reason = None
        async with aclosing(outputs(request)) as stream:
            async for output in stream:
                transcript = transcript or opened(service, request, output, options)
                new, frame = output.outputs[0], (output.kv_transfer_params or {}).get(PLUGIN)
                if events := transcript.told(new.token_ids, new.text, frame, output.finished):
                    yield events
                reason = new.finish_reason
    transcript = transcript or Transcript(service.renderer.tokenizer.decode, (), (), False)
    yield [transcript.done(reason or DEADLINE)]


async def until(
    ends: float | None, service: Any, raw_request: Request, request: Any
) -> AsyncGenerator[RequestOutput, None]:
    """The engine's outputs for one request, up to `ends` (the event loop's time), at which it is aborted.

    Raises:
        Refused: vLLM's serving did.
        GenerationError: the engine gave the request up.
    """
    answer = await service.ask(request, raw_request)
    if isinstance(answer, ErrorResponse):
        raise Refused(answer)
    async with aclosing(answer):
        while True:
            try:
                async with asyncio.timeout_at(ends):
                    output = await anext(answer)
            except (StopAsyncIteration, TimeoutError):
                return
            if output.outputs[0].finish_reason == "error":
                raise GenerationError("Internal server error")
            yield output


def drafted(request: Any) -> Any:
    """The request for a draft of the same answer."""
    return request.model_copy(update={"vllm_xargs": {**of_draft(request.vllm_xargs), "ouro_anytime": 0}})


def of_draft(xargs: dict[str, Any]) -> dict[str, Any]:
    """The options of a request for a draft of the answer that these are for."""
    return {name: value for name, value in xargs.items() if name not in OF_ANSWER} | {"ouro_loops": DRAFT_DEPTH}


def opened(service: Any, request: Any, output: RequestOutput, options: AnytimeOptions) -> Transcript:
    """The transcript of a request whose first output this is."""
    decode = partial(service.renderer.tokenizer.decode, skip_special_tokens=request.skip_special_tokens)
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    longest = getattr(request, "max_completion_tokens", None) or request.max_tokens
    return Transcript(decode, output.prompt_token_ids or (), stops, options.trace, longest)
