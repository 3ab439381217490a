"""How fast `finetune serve` writes: python scripts/bench/serving.py URL [shared | own] [STREAMS …]

At each level so many clients ask one after another until all requests are answered: 64, or 8 of each client where
these are fewer. The first requests are the same at every level, seeds included, so that the same tokens are written.
Client and server share the machine. The server may be another one that speaks OpenAI's chat completions.

shared: every request begins with the same long system prompt. own: each with another one of that length.
"""

import asyncio
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LEVELS = (1, 4, 16, 64)
REQUESTS, OF_A_CLIENT, MOST_TOKENS = 64, 8, 100
PROMPTS = ("Who are you?", "How much is 8 plus 5?", "What is the colour of the sky?", "Tell me about three blue cats.")
RULES = "You are kind and you say what you know about cats, dogs and birds in short words. " * 10
SYSTEMS = {"": "", "shared": f"Rule 1000: {RULES}", "own": f"Rule {{number}}: {RULES}"}
TEMPERATURE = 3.0  # at which the embedded model seldom ends a reply early


@dataclass(frozen=True)
class Answered:
    """tokens: written. first_s: until the first word, or the end of a reply of none. gaps_s: between words, seconds."""

    tokens: int
    first_s: float
    gaps_s: list[float]


def body(index: int, system: str = "") -> dict[str, Any]:
    """A request; equal ones for equal numbers. system: of `SYSTEMS`."""
    rules = [{"role": "system", "content": SYSTEMS[system].format(number=1000 + index)}] if system else []
    return {
        "messages": [*rules, {"role": "user", "content": PROMPTS[index % len(PROMPTS)]}],
        "seed": index,
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "max_tokens": MOST_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(url: str, asked: dict[str, Any]) -> Answered:
    """One request, read as it comes."""
    address, data = urlsplit(url), json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    began, times, tokens = time.perf_counter(), [], 0
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            times.append(time.perf_counter())
        elif event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    writer.close()
    assert tokens, "a reply was lost"
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Answered(tokens, (times or [time.perf_counter()])[0] - began, gaps_s)


async def level(url: str, streams: int, system: str = "") -> tuple[float, list[Answered]]:
    """Seconds, and the answers, with so many clients at once."""
    waiting, found = list(range(min(REQUESTS, OF_A_CLIENT * streams))), []

    async def client() -> None:
        while waiting:
            found.append(await ask(url, body(waiting.pop(0), system)))

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(streams)])
    return time.perf_counter() - began, found


def main() -> None:
    url, words = sys.argv[1], sys.argv[2:]
    system = words.pop(0) if words and words[0] in SYSTEMS else ""
    levels = [int(text) for text in words] or LEVELS
    asyncio.run(level(url, 4, system))  # warm-up
    print("| streams | tokens/s | first word p50, p95 (ms) | between words p95 (ms) |\n| --- | --- | --- | --- |")
    for streams in levels:
        seconds, found = asyncio.run(level(url, streams, system))
        first = statistics.quantiles([1000 * each.first_s for each in found], n=20)
        gaps = statistics.quantiles([1000 * gap for each in found for gap in each.gaps_s], n=20)
        rate = sum(each.tokens for each in found) / seconds
        print(f"| {streams} | {rate:.0f} | {first[9]:.0f}, {first[18]:.0f} | {gaps[18]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
