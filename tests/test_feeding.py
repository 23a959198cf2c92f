"""Work in threads, in order and within a limit."""

import threading
import time
from collections.abc import Iterator
from operator import length_hint

import pytest

from converter.pictures.feeding import in_order, worker_threads


def test_results_keep_the_order_of_the_items() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return 10 * item

    with worker_threads(3) as threads:
        assert list(in_order(slow_at_first, range(8), threads, 4)) == list(range(0, 80, 10))


def test_an_error_is_raised_in_the_place_of_its_result() -> None:
    def invert(item: int) -> float:
        time.sleep(0.05 if item else 0)  # the error is there first
        return 1 / item

    with worker_threads(4) as threads:
        results = in_order(invert, [2, 4, 0, 5], threads, 4)
        assert [next(results), next(results)] == [0.5, 0.25]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_an_error_of_the_items_waits_for_the_results_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the third is missing")

    with worker_threads(2) as threads:
        results = in_order(str, items(), threads, 5)
        assert [next(results), next(results)] == ["1", "2"]
        with pytest.raises(OSError, match="third"):
            next(results)


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_items_are_taken_than_the_limit(limit: int) -> None:
    items = iter(range(20))

    with worker_threads(2) as threads:
        for item in in_order(int, items, threads, limit):
            assert 20 - length_hint(items) <= item + limit
    assert length_hint(items) == 0


def test_without_workers_everything_runs_in_one_thread() -> None:
    with worker_threads(0) as threads:
        (found,) = in_order(lambda _: threading.current_thread(), [1], threads, 1)
    assert found is threading.current_thread()
