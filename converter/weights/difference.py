"""The difference between two float32 tensors that adds up again."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array


def subtract(total: "Array", base: "Array") -> "Array":
    """Computes differences that give the totals again, wherever float32 can.

    total - base is rounded, and base + difference is rounded again, which may miss the total. Of
    the rounded difference and its two neighbours, the one is taken whose sum with the base has the
    bits of the total. Where none has, the nearest is: the total is then much smaller than the base,
    so that no float32 number is close enough to the difference; or two of them are equally far.

    Args:
        total: float32, finite.
        base: float32, finite, of the same shape.
    """
    import numpy as np

    difference = total - base
    missed = np.flatnonzero((base + difference).view(np.uint32) != total.view(np.uint32))
    if missed.size:
        ours, theirs, middle = total[missed], base[missed], difference[missed]
        candidates = np.stack(
            [middle, *(np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf))]
        )
        sums = theirs + candidates
        # both in float64, where the distance of two float32 numbers is not rounded away
        distance = np.abs(sums.astype(np.float64) - ours)
        distance[sums.view(np.uint32) == ours.view(np.uint32)] = -1.0
        difference[missed] = np.take_along_axis(candidates, distance.argmin(0)[None], 0)[0]
    return difference
