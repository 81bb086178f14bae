"""`enumerate` and `islice` around a resumed loop count from where the run was, not from zero.

    for i, batch in enumerate(run.batches(loader)): …
    for batch in islice(run.batches(loader), 100): …

A run that is resumed after 60 batches must see i = 60, and 40 batches more. Both wrappers count
only what they have handed out, so they are wound forward: while the first item is being asked
for, they are asked for as many placeholders as there were batches. Their counters are read after
the inner item has arrived, which makes this exact, and the tests hold it to that. Wrappers written
in Python (a progress bar) do not change what the loop sees and are left alone.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

_COUNTING: tuple[type, ...] = (enumerate, itertools.islice)


def forward_wrappers(iterator: Iterator[Any], count: int) -> None:
    """Wind the counting wrappers around `iterator` forward by `count` placeholders.

    The iterator must answer with a placeholder while this runs. A wrapper that ends on the way,
    because the script has made it shorter, ends the loop: StopIteration goes through.
    """
    outermost: Any = iterator
    while (wrapper := _wrapper_of(outermost)) is not None:
        outermost = wrapper
    if outermost is not iterator:
        for _ in range(count):
            next(outermost)


def _wrapper_of(inner: Any) -> Any:
    for referrer in gc.get_referrers(inner):
        if isinstance(referrer, _COUNTING):
            return referrer
    return None
