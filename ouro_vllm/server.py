"""A server as a child process: started, waited for, asked, and stopped whatever happens. Pure Python."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
NAME = "ouro"
POLL_SECONDS = 0.5
# How long the server has to obey each signal before the next, harder one.
GRACE_SECONDS = 20.0
CHILDREN_SECONDS = 5.0
LOG_LINES = 30


class ServerError(Exception):
    """The server did not start, or did not answer; the message says what happened."""


class Server:
    """A server process in a session of its own, so that a Ctrl-C reaches it only through `stop`."""

    def __init__(self, command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.command, self.port, self.log, self.env = command, port, log, env
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, its output going to the log.

        Raises:
            ServerError: the command cannot be run.
        """
        with self.log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    start_new_session=True,
                )
            except OSError as error:
                raise ServerError(f"{self.command[0]} cannot be run: {error.strerror}.") from error

    def wait_healthy(self, seconds: float, poll: float = POLL_SECONDS) -> None:
        """Return once /health answers 200.

        Raises:
            ServerError: the process ended first, or `seconds` went by.
        """
        deadline = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() > deadline:
                raise ServerError(f"The server was not ready after {seconds:.0f} s.")
            # Waiting for the process to end is the pause between two polls.
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(poll)
                raise ServerError(f"The server ended before it was ready, exit status {status}.")

    def healthy(self) -> bool:
        """Whether /health answers 200 now."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, grace: float = GRACE_SECONDS) -> int | None:
        """End the process: SIGINT, SIGTERM, then SIGKILL to it and to all it started. Returns its exit status.

        Each signal has `grace` seconds; a Ctrl-C meanwhile goes straight to SIGKILL. Nothing happens a second time.
        """
        if self.process is None:
            return None
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                if self.process.poll() is None:
                    self.process.send_signal(number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(grace)
            if self.process.poll() is not None:
                self.wait_for_children(min(grace, CHILDREN_SECONDS))
        except KeyboardInterrupt:
            print("Not waiting any longer.", file=sys.stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            status, self.process = self.process.wait(), None
        return status

    def wait_for_children(self, seconds: float) -> None:
        """Return once the process's session is empty: its children clean up behind it. At most after `seconds`."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)

    def last_lines(self, count: int = LOG_LINES) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def events(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a server-sent stream, each parsed, up to `[DONE]`.

    Raises:
        ServerError: the server refused, reported an error, or the stream ended before `[DONE]`.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=600)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            refusal = response.read().decode(errors="replace")
            raise ServerError(f"{path} was refused with status {response.status}: {refusal}")
        for line in response:
            data = line.decode().strip().removeprefix("data:").strip() if line.startswith(b"data:") else ""
            if data == "[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"The server reported: {json.dumps(event['error'])}")
                yield event
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerError(f"The connection to the server broke: {error!r}.") from error
    finally:
        connection.close()
    raise ServerError("The answer broke off.")


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
