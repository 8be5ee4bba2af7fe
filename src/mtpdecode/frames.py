"""Room for Python's frames, so that the depth at which somebody calls us decides nothing.

CPython keeps the frames of a thread in chunks of 16 KB and unmaps a chunk the moment that it is empty:

    | generate | decode | round | model | layer |   a chunk ends here   | operator |      mapped for this call, unmapped behind it

Where a loop stands at the end of a chunk, each call in it maps and unmaps memory, 10 to 60 us with the page faults. A compiled
round calls some hundred operators from one place: 41 ms instead of 27 for the same graph, by the caller's depth alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")

SLOTS = 2**15
"""Of 8 bytes, more than half of the chunk that is mapped for them (512 KB): the other half is left for what is called."""


def with_room(function: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result:
    """Calls a function from a frame that is too large for any chunk in use, and so is given a new one. About 20 us, and a page
    fault for each page that is then touched: worth it ahead of rounds, not of operators."""
    return function(*given, **named)


with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)
