"""`enumerate` and `islice` around a resumed loop count from where the run was, not from zero.

    for i, batch in enumerate(run.batches(loader)): …
    for batch in islice(run.batches(loader), 100): …

A run that is resumed after 60 batches must see i = 60, and 40 batches more. Both wrappers count
only what they have handed out, so they are wound forward: while the first item is being asked
for, they are asked for as many placeholders as there were batches. Their counters are read after
the inner item has arrived, which makes this exact, and the tests hold it to that.

Wrappers written in Python (a progress bar) do not change what the loop sees. But a counter around
one of them is out of reach, because the bar is running: that is said in the log.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType, GeneratorType
from typing import Any

from runner.errors import PositionError

log = logging.getLogger(__name__)

_COUNTING: tuple[type, ...] = (enumerate, itertools.islice)


def forward_wrappers(iterator: Iterator[Any], count: int, handed_out: Callable[[], int]) -> None:
    """Wind the counting wrappers around `iterator` forward until it has handed out `count`.

    The iterator must answer with a placeholder while this runs, and count it. A wrapper that ends
    on the way ends the loop: StopIteration goes through. PositionError for an `islice` that leaves
    batches out.
    """
    wrappers = list(_wrappers_of(iterator))
    while wrappers and handed_out() < count:
        before = handed_out()
        next(wrappers[-1])
        if handed_out() - before != 1:
            raise PositionError(
                "the islice() around run.batches() has a start or a step, so it cannot be wound "
                "forward to where the run was; let the body pass over batches with `continue`"
            )
    if any(_is_spent(wrapper) for wrapper in wrappers):
        raise StopIteration
    if count and _is_counted_from_outside():
        log.warning(
            "enumerate() or islice() around a generator (a progress bar?) around run.batches() "
            "begins at 0 again: take the number of the batch from run.batch, or write "
            "tqdm(enumerate(run.batches(loader)))"
        )


def _wrappers_of(iterator: Any) -> Iterator[Any]:
    """The counting wrappers, from the inside out."""
    inner: Any = iterator
    while inner is not None:
        referrers = gc.get_referrers(inner)
        inner = next((one for one in referrers if isinstance(one, _COUNTING)), None)
        if inner is not None:
            yield inner


def _is_spent(wrapper: Any) -> bool:
    """Whether an `islice` has handed out all that it may.

    It does not look at its end again before it hands out what it is just asking for. Python 3.14
    no longer tells: there, a run that goes through one loop slice by slice, and was saved between
    two slices, gets one batch too many in the first one.
    """
    if not isinstance(wrapper, itertools.islice) or sys.version_info >= (3, 14):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        how_to_make_it: Any = wrapper.__reduce__()  # islice, (inner, next, stop, step), handed out
    _, arguments, *handed_out = how_to_make_it
    stop = arguments[2] if len(arguments) == 4 else None
    return stop is not None and handed_out[0] >= stop


def _is_counted_from_outside() -> bool:
    """Whether a counting wrapper is around a running generator that asks the loop for batches."""
    running = list(map(id, _generators_above(sys._getframe())))
    return any(
        isinstance(inner, GeneratorType) and id(inner.gi_frame) in running
        for wrapper in gc.get_objects()
        if issubclass(type(wrapper), _COUNTING)
        for inner in gc.get_referents(wrapper)
    )


def _generators_above(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of generators between the loop and the script's `for`."""
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        yield frame
        frame = frame.f_back
