"""Runs the front door until SIGINT or SIGTERM, and lets what has begun come to its end."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import cast

import torch
import uvicorn

from finetune.errors import ConfigError, ModelError
from finetune.run.cores import usable_cores
from finetune.run.progress import say
from finetune.serving.app import Service, State, build
from finetune.serving.guard import Rules
from finetune.serving.requests import Refused
from finetune.serving.runs import Runs

DRAIN_S = 10  # until connections are cut


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError where the address or the port can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number in errno.errorcode else error
        line = f"can't listen on {host}, port {port} ({reason}); try serve.port=0, which takes a free one"
        raise ConfigError(line) from error


def run(service: Service, rules: Rules, listener: socket.socket, runs: Runs) -> None:
    """Serve until a signal. Raises ModelError where the default adapter can't be used."""

    def take_signals(stop: Callable[[], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)

    if service.leaves_a_core and "OMP_NUM_THREADS" not in os.environ:
        # A step is as slow as its slowest thread: one that shares its core with the requests holds up all others.
        torch.set_num_threads(max(1, usable_cores() - 1))
    asyncio.run(_serve(service, rules, listener, runs, take_signals))


@contextmanager
def in_background(service: Service, rules: Rules, listener: socket.socket, runs: Runs) -> Iterator[None]:
    """Serve inside the block, in a thread. Raises ModelError where the default adapter can't be used."""
    started: Future[Callable[[], None]] = Future()

    def hand_out(stop: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        started.set_result(lambda: cast(None, loop.call_soon_threadsafe(stop)))

    def work() -> None:
        try:
            asyncio.run(_serve(service, rules, listener, runs, hand_out))
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=work, name="server", daemon=True)
    thread.start()
    stop = started.result()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # it has ended by itself
            stop()
        thread.join()


async def _serve(
    service: Service,
    rules: Rules,
    listener: socket.socket,
    runs: Runs,
    on_start: Callable[[Callable[[], None]], None],
) -> None:
    """on_start: is given what stops the server, before it begins."""
    try:
        async with service.shelf.using(service.shelf.default):
            pass
    except Refused as error:
        raise ModelError(error.message) from error
    state = State()
    config = uvicorn.Config(
        build(service, rules, state, runs),
        log_config=None,
        log_level="critical",  # failures are said by the front door
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="off",
        ws="none",
    )
    server = _Server(config)

    def stop() -> None:
        server.force_exit = state.draining  # the second time
        state.draining = server.should_exit = True
        say("serve: shutting down; replies that have begun are finished")

    on_start(stop)
    await server.serve(sockets=[listener])
