"""Whether `finetune serve` stays as large as it is: python -m scripts.bench.soak URL [REQUESTS]

So many requests of `serving.py`, 16 at once, a tenth after another, and after each tenth the memory of the server as
its `/metrics` say.
"""

import asyncio
import re
import sys
import urllib.request
from collections.abc import Sequence

from scripts.bench import serving

STREAMS, REQUESTS, PARTS = 16, 300, 10
MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


def memory_mib(url: str) -> float:
    """What the server's process holds."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        found = MEMORY.search(answer.read().decode())
    assert found, "this server doesn't say how large it is"
    return float(found[1]) / 2**20


async def answered(url: str, indices: Sequence[int]) -> int:
    """Tokens of the answers to these requests; one that is lost is an error."""
    waiting, tokens = list(indices), 0

    async def client() -> None:
        nonlocal tokens
        while waiting:
            found = await serving.ask(url, serving.body(waiting.pop()))
            tokens += found.tokens  # not in one line: a sum that waits in its middle loses what others add

    await asyncio.gather(*[client() for _ in range(STREAMS)])
    return tokens


def main() -> None:
    url, requests = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else REQUESTS
    asyncio.run(serving.level(url, STREAMS))  # warm-up
    print(f"| requests | tokens | memory (MiB) |\n| --- | --- | --- |\n| 0 | 0 | {memory_mib(url):.0f} |", flush=True)
    tokens, sent = 0, 0
    for part in range(1, PARTS + 1):
        indices = range(sent, part * requests // PARTS)
        tokens, sent = tokens + asyncio.run(answered(url, indices)), indices.stop
        print(f"| {sent} | {tokens} | {memory_mib(url):.0f} |", flush=True)


if __name__ == "__main__":
    main()
