"""What the stopwatch of servers makes of a reply."""

import asyncio

import pytest

from scripts.bench.serving import Answered, ask, body

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
WORD = b'data: {"choices": [{"delta": {"content": "Ahoy"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n'


async def asked(reply: bytes) -> Answered:
    """The answer of a server that says this to everybody."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + reply)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await ask(f"http://127.0.0.1:{port}", body(0))


def test_words_have_gaps_and_a_reply_of_none_has_an_end() -> None:
    spoken, silent = asyncio.run(asked(2 * WORD + USAGE % 2)), asyncio.run(asked(USAGE % 1))
    assert (spoken.tokens, len(spoken.gaps_s)) == (2, 1)
    assert (silent.tokens, silent.gaps_s) == (1, [])
    assert silent.first_s > 0


def test_a_reply_that_says_nothing_of_its_length_is_lost() -> None:
    with pytest.raises(AssertionError, match="a reply was lost"):
        asyncio.run(asked(WORD))
