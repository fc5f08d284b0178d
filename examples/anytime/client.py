"""A whole draft at once, then the answer that settles it. Usage: client.py [ADDRESS [API_KEY]]"""

import asyncio
import sys

from ouro_vllm.anytime import Answer, events

ADDRESS, KEY = [*sys.argv[1:], *["http://127.0.0.1:8000", "none"][len(sys.argv) - 1 :]]
BODY = {
    "prompt": "import os\nimport sys\n\n\ndef main(argv):\n",
    "max_tokens": 48,
    "temperature": 0,
    "anytime": {"mode": "progressive"},
}


async def main() -> None:
    answer = Answer()
    async for event in events(f"{ADDRESS}/v1", BODY, KEY):
        answer.feed(event)
        print(f"{len(answer.token_ids):3} committed, {len(answer.tail_ids):3} provisional", file=sys.stderr)
    print(answer.committed)


asyncio.run(main())
