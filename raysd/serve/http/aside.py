"""Threads for what a stranger can make long, apart from those in which keys, the queue and the store are asked.

A picture is decoded for as long as its bytes say, and a name resolved for as long as its name server is silent. Where all
threads are at it, others who send pictures or name webhooks wait; nobody else does.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

DECODERS = 2
"""Few: each holds a whole picture, and computes."""
RESOLVERS = 16
"""They only wait."""
Args = ParamSpec("Args")
Value = TypeVar("Value")


class Aside:
    """Both kinds of threads of one application. They begin when they are first needed."""

    def __init__(self) -> None:
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolve")

    async def decode(self, call: Callable[Args, Value], *args: Args.args, **named: Args.kwargs) -> Value:
        """What `call` returns, which looks at a picture that was sent."""
        return await _run(self._decoders, partial(call, *args, **named))

    async def resolve(self, call: Callable[Args, Value], *args: Args.args, **named: Args.kwargs) -> Value:
        """What `call` returns, which asks a name server."""
        return await _run(self._resolvers, partial(call, *args, **named))

    def close(self) -> None:
        """What has not begun is not done any more."""
        for threads in (self._decoders, self._resolvers):
            threads.shutdown(wait=False, cancel_futures=True)


async def _run(threads: Executor, call: Callable[[], Value]) -> Value:
    return await asyncio.get_running_loop().run_in_executor(threads, call)
