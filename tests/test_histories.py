"""Whatever a run does, and wherever its supervisor is killed, nothing that counts is lost.

Histories of saves, pins and restarts are drawn; a kill comes at one of the calls to the store. The
next supervisor begins over what is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from slots import RUN, memory_folder, views

from runner.checkpoint.archive import Archive
from runner.checkpoint.attempts import Ledger
from runner.checkpoint.manifest import Moment
from runner.checkpoint.persist import Persister
from runner.checkpoint.retention import Keep, pins
from runner.store import Content, DirectoryStore, Staging

CHANGES = ("create", "replace", "put", "delete", "write", "copy", "commit", "abort")


class Killed(BaseException):
    """The supervisor is gone in the middle of a call."""


@dataclass
class KilledAt:
    """Counts calls that change the store, and kills at one: before it, or after it was done."""

    call: int | None = None
    after: bool = False
    seen: int = 0

    def around(self, method: Callable[..., Any], *arguments: Any) -> Any:
        self.seen += 1
        if self.seen == self.call and not self.after:
            raise Killed
        answer = method(*arguments)
        if self.seen == self.call:
            raise Killed
        return answer


@dataclass
class MortalStore:
    """A directory store whose caller may be killed. A dead one cleans up nothing."""

    store: DirectoryStore
    killed: KilledAt
    url: str = ""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if name == "delete":  # key by key, so that a kill may come between two
            return lambda keys: [self.killed.around(method, [key]) for key in keys]
        if name == "stage":
            return lambda *arguments: MortalStaging(method(*arguments), self.killed)
        if name in CHANGES:
            return lambda *arguments: self.killed.around(method, *arguments)
        return method


@dataclass
class MortalStaging:
    staging: Staging
    killed: KilledAt

    def write(self, contents: Sequence[Content]) -> Any:
        """File by file, so that a kill may come between two."""
        return [self.killed.around(self.staging.write, [content])[0] for content in contents]

    def copy(self, *arguments: Any) -> None:
        self.killed.around(self.staging.copy, *arguments)

    def commit(self, *arguments: Any) -> None:
        self.killed.around(self.staging.commit, *arguments)

    def abort(self) -> None:
        if self.killed.call is None or self.killed.seen < self.killed.call:
            self.killed.around(self.staging.abort)


@dataclass
class Run:
    """What the run has done, said once more in the simplest way."""

    store: DirectoryStore
    keep: Keep
    saved: list[Moment] = field(default_factory=list)
    in_doubt: Moment | None = None
    pinned: set[str] = field(default_factory=set)

    def whole(self) -> dict[str, Moment]:
        archive = Archive(self.store, RUN)
        found = {}
        for manifest in archive.manifests():
            archive.verify(manifest)  # whatever has a manifest is sound
            found[manifest.name] = manifest.moment
        return found

    def must_be_there(self) -> set[str]:
        """The newest full one, the best K of all that were ever saved, and the pins."""
        full = [moment for moment in self.saved if moment.scope == "full"]
        scored = [m for m in self.saved if math.isfinite(m.metrics.get("rmse", math.nan))]
        scored.sort(key=lambda m: m.metrics["rmse"])
        kept = full[-1:] + (scored[: self.keep.best_count] if self.keep.best_metric else [])
        return {str(moment.name) for moment in kept} | self.pinned


saves = st.tuples(
    st.just("save"),
    st.none() | st.integers(0, 5).map(float),
    st.sampled_from(["full", "full", "weights"]),
)
operations = st.lists(
    saves
    | saves
    | st.tuples(st.sampled_from(["pin", "unpin"]), st.integers(0, 4))
    | st.just(("restart",)),
    min_size=4,
    max_size=10,
)
keeps = st.builds(
    Keep,
    last=st.integers(1, 2),
    best_metric=st.none() | st.just("rmse"),
    best_count=st.integers(1, 2),
)


@settings(max_examples=600, deadline=None)
@given(operations, keeps, st.integers(5, 50), st.booleans())
def test_nothing_that_counts_is_lost_wherever_the_supervisor_is_killed(
    history: Sequence[tuple[Any, ...]], keep: Keep, call: int, after: bool
) -> None:
    with memory_folder() as folder:
        run = Run(DirectoryStore(folder), keep)
        killed = KilledAt(call, after)
        number = 0
        saver: Persister | None = None
        for operation in history:
            for _ in range(2):  # a second time after the kill
                try:
                    saver = saver or supervisor(run, killed)
                    perform(run, saver, operation, number)
                    if operation[0] == "restart":
                        saver = None
                    break
                except Killed:
                    saver = None
                    note_what_was_committed(run)
                finally:
                    number += 1
                    assert run.must_be_there() <= set(run.whole())
        settled(run)


def supervisor(run: Run, killed: KilledAt) -> Persister:
    store: Any = MortalStore(run.store, killed)
    ledger = Ledger(store, RUN, f"{killed.seen:016x}")
    ledger.claim("node")
    saver = Persister(store, ledger, run.keep)
    saver.sweep()
    return saver


def perform(run: Run, saver: Persister, operation: tuple[Any, ...], number: int) -> None:
    match operation:
        case ("save", metric, scope):
            assert saver.ledger.record is not None
            moment = Moment(
                attempt=saver.ledger.record.attempt,
                save=number + 1,
                step=10 * (number + 1),
                epoch=0,
                batch=number + 1,
                scope=scope,
                metrics={} if metric is None else {"rmse": metric},
            )
            run.in_doubt = moment
            files = {"model.safetensors": b"m" * (number + 1), "state.json": b"{}"}
            manifest = saver.persist(moment, views(files))
            run.saved.append(moment)
            run.in_doubt = None
            saver.ledger.committed(manifest.name, moment.step)
            saver.retain()
        case ("pin", which):
            there = sorted(run.whole())
            if there:
                name = there[which % len(there)]
                run.store.create(f"{RUN}/pins/{name}", b"")
                run.pinned.add(name)
        case ("unpin", which):
            if run.pinned:
                name = sorted(run.pinned)[which % len(run.pinned)]
                run.pinned.discard(name)
                run.store.delete([f"{RUN}/pins/{name}"])


def note_what_was_committed(run: Run) -> None:
    """A save that was killed after its commit counts, although nobody was told."""
    moment, run.in_doubt = run.in_doubt, None
    if moment is not None and str(moment.name) in run.whole():
        run.saved.append(moment)


def settled(run: Run) -> None:
    """A last supervisor leaves what the policy keeps, and nothing of what was begun."""
    last = supervisor(run, KilledAt())
    last.retain()
    there = run.whole()
    assert run.must_be_there() <= set(there)
    assert last.retain() == []
    assert pins(run.store, RUN) == run.pinned
    folder = run.store.root / RUN / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == sorted(there) if there else True
    full = [m for m in there.values() if m.scope == "full" and str(m.name) not in run.pinned]
    kept_by_rules = run.keep.last + (run.keep.best_count if run.keep.best_metric else 0)
    assert len(full) <= kept_by_rules + 1
