"""Calls from the end of a chunk of frames, which cost a mapping each, and calls with room, which do not."""

import resource
import sys

import pytest

from mtpdecode.frames import with_room

NUM_CALLS, DEPTHS = 100, range(400)
operator = eval(f"lambda: ({', '.join(f'(x{i} := 0)' for i in range(30))})")
"""Nothing but a frame larger than one of `at_depth`, so that some depth is the end of a chunk."""


def operators():
    for _ in range(NUM_CALLS):
        operator()


def at_depth(depth, function):
    """Page faults while a function runs that many frames down."""
    if depth:
        return at_depth(depth - 1, function)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux counts them")
def test_no_depth_maps_memory_for_every_call():
    without = max(at_depth(depth, operators) for depth in DEPTHS)
    if without < NUM_CALLS:
        pytest.skip("this Python keeps its chunks")
    assert max(at_depth(depth, lambda: with_room(operators)) for depth in DEPTHS) < NUM_CALLS // 2


def test_calls_and_raises_as_without():
    assert with_room(divmod, 7, 2) == (3, 1)
    assert with_room(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 1, 0)
