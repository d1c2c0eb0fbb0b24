"""The fit of a router's price: its answer depends on the numbers alone."""

import numpy as np
import pytest

from nestlm.router.dynamic.logits import least_squares


def test_the_fit_is_that_of_least_squares_and_of_no_order_nor_place():
    generator = np.random.default_rng(0)
    known = generator.normal(size=(40, 2)) * (1e-3, 1.0)
    wanted = known @ (2.0, 0.5) + 0.1 * generator.normal(size=40)
    found = least_squares(known.tolist(), wanted.tolist())
    assert found == pytest.approx(np.linalg.lstsq(known, wanted)[0], rel=1e-9)
    for offset in range(1, 9):  # the same numbers elsewhere in memory, and in another order
        order = generator.permutation(40)
        place = np.empty(offset + 80)[offset:].reshape(40, 2)
        place[:] = known[order]
        assert least_squares(place.tolist(), wanted[order].tolist()) == found


@pytest.mark.parametrize("known", [[(1.0, 2.0), (2.0, 4.0)], [(0.0, 1.0), (0.0, 2.0)], [(0.0, 0.0), (0.0, 0.0)]])
def test_of_several_fits_the_smallest_is_taken(known):
    assert least_squares(known, [1.0, 3.0]) == pytest.approx(np.linalg.lstsq(np.array(known), [1.0, 3.0])[0])
