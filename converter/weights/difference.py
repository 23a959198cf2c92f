"""The difference between two float32 tensors that adds up again."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converter.weights.tensorfiles import Array


def subtract(total: "Array", base: "Array") -> "Array":
    """Computes differences that give the totals again, wherever float32 can.

    total - base is rounded, and base + difference is rounded again, which may miss the total. Of
    the rounded difference and its two neighbours, the one is taken whose sum with the base has the
    bits of the total: float32 numbers are twice as close below a power of two as above it, so a
    neighbour may reach one that the rounded difference misses. Where none has, the nearest is
    taken: the total is smaller than the base or has another sign, and no float32 number is close
    enough to the difference.

    Args:
        total: float32, finite.
        base: float32, finite, of the same shape.
    """
    import numpy as np

    difference = total - base
    zeros = (difference == 0) & (total == 0)
    difference[zeros] = total[zeros]  # with its sign, which -0.0 - -0.0 loses
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
