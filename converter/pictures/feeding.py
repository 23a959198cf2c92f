"""Work on pictures beside the network: they are read ahead of it, and written behind it.

This is done by threads, because Pillow, zlib and most of NumPy let other threads run while they
work. Worker processes have to start first, and to hand every picture over: two threads read and
resize a JPEG of 1920x1080 in 14 to 31 ms on two busy cores, two workers of torch's DataLoader in 40
to 46 ms, with 220 MB in memory for each.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# more workers than this have nothing to do: a single thread runs the network for all of them
_MOST_WORKERS = 16


def default_workers() -> int:
    """One worker for each core that this process may use, up to a limit."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


@contextmanager
def worker_threads(count: int) -> Iterator[Executor | None]:
    """Threads for `in_order`; None if the count is 0.

    At the end of the block, what they have begun is finished, and the rest is dropped.
    """
    if count == 0:
        yield None
        return
    threads = ThreadPoolExecutor(count, thread_name_prefix="pictures")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: Executor | None,
    limit: int,
) -> Iterator[Result]:
    """Applies a function to items in threads, and gives the results in the items' order.

    An error of the function, or of the iterable, is raised in the place of its result: after the
    results of all items before it.

    Args:
        function: is called in several threads at once.
        items: are taken one by one, in the thread that takes the results.
        threads: None to call the function in that thread, too.
        limit: number of items, from 1, that may have been taken while their results have not.
    """
    if threads is None:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    failure = None
    remaining = iter(items)
    while True:
        try:
            item = next(remaining)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        waiting.append(threads.submit(function, item))
        del item  # only the threads hold it from here on
        if len(waiting) == limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    if failure is not None:
        raise failure
