"""An asynchronous client. Needs httpx, which vLLM brings along."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from ouro_vllm.anytime.protocol import decoded


class AnytimeError(Exception):
    """The server refused, reported an error, or the stream broke off."""


async def events(
    base_url: str, body: Mapping[str, Any], api_key: str | None = None, timeout: float = 600.0
) -> AsyncIterator[dict[str, Any]]:
    """Ask, and yield the events up to the last. Leaving the loop hangs up, which ends the request on the server.

    base_url: of the API, ending in /v1. body: of a completion (`prompt`) or a chat (`messages`), with `anytime` if
    options are wanted. timeout: seconds without any event.

    Raises:
        AnytimeError: see there; also where address, key or body cannot be sent as they are.
    """
    import httpx

    kind = "chat/completions" if "messages" in body else "completions"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    ended = False
    try:
        async with (
            httpx.AsyncClient(timeout=timeout) as client,
            client.stream("POST", f"{base_url}/anytime/{kind}", json=dict(body), headers=headers) as response,
        ):
            if response.status_code != 200:
                raise AnytimeError(f"{response.status_code}: {_message((await response.aread()).decode())}")
            async with aclosing(response.aiter_lines()) as lines:
                async for line in lines:
                    event = decoded(line)
                    if event is None:
                        continue
                    if event["type"] == "error":
                        raise AnytimeError(event["error"]["message"])
                    yield event
                    ended = event["type"] == "done"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise AnytimeError(f"{base_url}: {type(error).__name__} {error}".rstrip()) from error
    if not ended:
        raise AnytimeError(f"{base_url}: the answer broke off")


def _message(body: str) -> str:
    """The message of an error response, or all of it."""
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body
    return found["message"] if isinstance(found, dict) else str(found)
