"""Sizes that an exported file's input takes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from converter.runtimes.exported import Axis, Port
from converter.runtimes.network import run_in_batches


@pytest.mark.parametrize(
    ("axis", "size", "expected"),
    [
        (Axis(), 70, 64),
        (Axis(), 10, 16),
        (Axis(size=80), 64, 80),
        (Axis(size=70), 64, None),
        (Axis(least=40), 16, 48),
        (Axis(least=33, most=47), 64, None),
        (Axis(factor=32), 80, 64),
        (Axis(factor=16, least=4, most=8), 32, 64),
        (Axis(factor=16, least=4, most=8), 640, 128),
    ],
)
def test_the_nearest_size_of_an_axis_is_a_whole_number_of_patches(
    axis: Axis, size: int, expected: int | None
) -> None:
    assert axis.nearest(size, 16) == expected
    assert expected is None or axis.problem(expected) == ""


def port(batch: Axis, height: Axis, width: Axis) -> Port:
    return Port("pixel_values", "float32", (batch, Axis(size=3), height, width))


def test_axes_with_one_symbol_have_one_multiple() -> None:
    side = Axis(factor=16, symbol="s")
    square = port(Axis(least=2), side, side)

    assert square.problem_with((2, 3, 32, 32)) == ""
    assert "the width is 64, expected 32" in square.problem_with((2, 3, 32, 64))
    assert "the batch size is 1" in square.problem_with((1, 3, 32, 32))
    assert square.nearest((1, 3, 48, 64), 16) == (2, 3, 48, 48)


def test_an_input_that_takes_no_whole_patches_has_no_nearest_shape() -> None:
    narrow = port(Axis(), Axis(least=33, most=47), Axis())
    tied = port(Axis(symbol="s"), Axis(symbol="s"), Axis())

    assert narrow.nearest((1, 3, 32, 32), 16) is None
    assert tied.nearest((1, 3, 32, 32), 16) is None


class Doubling:
    """A session that notes the batch sizes that it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        self.batches.append(len(pixel_values))
        return {"mask_logits": pixel_values * 2}

    def providers(self) -> tuple[str, ...]:
        return ()

    def nodes_by_provider(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(Axis(), [5]), (Axis(size=3), [3, 3]), (Axis(least=8), [8]), (Axis(most=4), [4, 4])],
)
def test_inputs_are_put_into_batches_that_a_file_takes(batch: Axis, expected: list[int]) -> None:
    pixels, session = torch.arange(5.0).reshape(5, 1, 1, 1), Doubling()
    found = run_in_batches(session, pixels, batch)

    assert session.batches == expected
    assert np.array_equal(found["mask_logits"], pixels.numpy() * 2)
