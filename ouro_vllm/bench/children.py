"""Engines as child processes: one line of JSON on stdin asks, one on stdout answers. Pure Python.

On Linux a child that is not asked is stopped (SIGSTOP): of vLLM's threads, those of the network library gloo wake up a
thousand times a second, 1 or 2% of a core. Elsewhere nothing would end a stopped child whose parent was killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0  # how long a child has to leave before each harder way of ending it
LOG_LINES = 30
WORKER = [sys.executable, "-P", "-m", "ouro_vllm.bench.worker"]


class BenchError(Exception):
    """A child did not start, failed or died; the message says which and why."""


class Child:
    """A child, `worker.main`, in a session of its own, so that a Ctrl-C reaches it only through `stop`."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], log: Path) -> None:
        """name: for messages. log: takes what it writes to stderr.

        Raises:
            BenchError: the command cannot be run.
        """
        self.name, self.log = name, log
        with log.open("wb") as output:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env=env,
                    start_new_session=True,
                    text=True,
                )
            except OSError as error:
                raise BenchError(f"{name}: {command[0]} cannot be run: {error.strerror}.") from error

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send the message and wait for the answer.

        Raises:
            BenchError: the child reports an error, babbles or is gone.
        """
        line = ""
        self.send(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if sys.platform == "linux":
            self.send(signal.SIGSTOP)
        if not line:
            raise BenchError(f"{self.name}: the engine's process died. The last lines of its log:\n{self.last_lines()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise BenchError(f"{self.name}: no answer but {line.strip()[:200]!r}.") from None
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def send(self, number: int) -> None:
        """Send a signal to it and to all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def hint(self) -> None:
        """Close its stdin, at which it leaves once it has nothing left to do."""
        self.send(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def stop(self, grace: float) -> None:
        """End it: after `hint`, SIGTERM, then SIGKILL to all it started, `grace` seconds between."""
        self.hint()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(grace)
        finally:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def stop_all(children: Iterable[Child], grace: float) -> None:
    """Stop them all.

    Raises:
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM meanwhile, all that was left having been killed at once.
    """
    interrupt = None
    for hinted, child in product((False, True), list(children)):
        try:
            if hinted:
                child.stop(grace)
            else:
                child.hint()
        except (KeyboardInterrupt, SystemExit) as error:
            print("Not waiting any longer.", file=sys.stderr)
            grace, interrupt = 0, error
    if interrupt is not None:
        raise interrupt
