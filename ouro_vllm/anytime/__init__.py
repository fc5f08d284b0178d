"""Answers while they form: events with a committed text and a provisional tail behind it.

For clients: `Answer` turns events into (committed, provisional), `events` asks a server for them. Importing this loads
neither torch nor vLLM. On the server: `endpoint` (routes), `transcript` and `pieces` (engine outputs to events),
`frames` (what the engine sends beside its tokens).
"""

from ouro_vllm.anytime.client import AnytimeError, events
from ouro_vllm.anytime.protocol import AnytimeOptions
from ouro_vllm.anytime.reducer import Answer, reduce

__all__ = ["Answer", "AnytimeError", "AnytimeOptions", "events", "reduce"]
