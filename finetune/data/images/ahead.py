"""Images are read in threads, the next ones while one is used."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 4
READ_AHEAD = 2 * THREADS
Item = TypeVar("Item", bound=Hashable)
Read = TypeVar("Read")


def ahead(items: Sequence[Item], read: Callable[[Item], Read], count: int = READ_AHEAD) -> Iterator[Read]:
    """What `read` makes of each, in order; up to `count` wait. Equal neighbours, such as an image and its mirror image,
    are read once."""
    found: dict[Item, Future[Read]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(len(items)):
            needed = dict.fromkeys(items[number : number + count])
            found = {item: found.get(item) or pool.submit(read, item) for item in needed}
            yield found[items[number]].result()
