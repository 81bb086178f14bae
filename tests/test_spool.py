from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from children import Children
from slots import Snapshot, fill, memory_folder, read_slot, small_disk, snapshot
from waiting import wait_until

from runner.board import Board, Request, Why
from runner.errors import SpoolError, SpoolFull, SpoolTaken
from runner.points import PointReader
from runner.regular import open_regular
from runner.spool import (
    Marker,
    RankSpool,
    Spool,
    give_to,
    is_locked,
    new_owner,
    open_slot,
    read_json,
    read_marker,
    spool_path,
    view_slot,
)

OLD, NEW = snapshot(save=1), snapshot(save=2)
LARGEST = 2**64 - 1


@pytest.fixture
def rank(tmp_path: Path) -> RankSpool:
    rank = RankSpool(tmp_path / "rank-00000", disk=tmp_path / "disk")
    rank.folder.mkdir()
    return rank


def files(rank: RankSpool) -> list[str]:
    return sorted(path.name for path in rank.folder.iterdir())


# ---------------------------------------------------------------- handing a slot over


def test_a_slot_without_a_marker_does_not_exist(rank: RankSpool) -> None:
    rank.slot_path(0).write_bytes(b"half a copy")

    assert rank.complete() == []
    assert rank.claim(0) is None


def test_a_published_slot_is_complete_and_says_what_it_holds(rank: RankSpool) -> None:
    marker = fill(rank, 0, NEW, must=True, facts={"torch": "2.6"})

    (found,) = rank.complete()

    assert found == marker
    assert (found.slot, found.must, found.order) == (0, True, (1, 2))
    assert read_slot(rank, found) == NEW.files


def test_complete_slots_are_listed_oldest_first_by_attempt_and_save(rank: RankSpool) -> None:
    by_age = [
        snapshot(1, 9, step=900),
        snapshot(1, 10, step=901),
        snapshot(2, 1, step=5),
        snapshot(10, 1, step=3),
    ]
    for slot, taken in enumerate(by_age[::-1]):
        fill(rank, slot, taken)

    assert [marker.order for marker in rank.complete()] == [(1, 9), (1, 10), (2, 1), (10, 1)]


def test_a_claimed_slot_is_neither_complete_nor_withdrawn(rank: RankSpool) -> None:
    marker = fill(rank, 0, NEW)

    assert rank.claim(0) == marker
    assert rank.is_claimed(0)
    assert rank.complete() == []
    assert not rank.withdraw(0)
    assert rank.claim(0) is None


def test_a_withdrawn_slot_is_not_claimed(rank: RankSpool) -> None:
    fill(rank, 0, NEW)

    assert rank.withdraw(0)
    assert rank.claim(0) is None
    assert not rank.is_claimed(0)
    assert not rank.withdraw(0)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_slot_that_is_given_back_is_complete_again(
    rank: RankSpool, before: bool, after: bool
) -> None:
    marker = fill(rank, 0, NEW, must=before, facts={"a": 1})
    rank.claim(0)

    rank.give_back(0, must=after)

    assert rank.complete() == [replace(marker, must=after)]
    assert not rank.is_claimed(0)
    assert files(rank) == ["slot-0", "slot-0.json"]


def test_giving_back_what_was_not_claimed_changes_nothing(rank: RankSpool) -> None:
    marker = fill(rank, 0, NEW)

    rank.give_back(0)
    rank.give_back(1, must=True)

    assert rank.complete() == [marker]
    assert files(rank) == ["slot-0", "slot-0.json"]


@pytest.mark.parametrize("before", [False, True])
def test_a_slot_can_be_given_back_without_any_memory(
    rank: RankSpool, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """One that was persisted is free then; one that was not is there, and may be tried again."""
    marker = fill(rank, 0, NEW, must=before)
    rank.claim(0)

    def full(path: Path, flags: int = os.O_RDONLY, mode: int = 0) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_regular(path, flags)

    monkeypatch.setattr("runner.spool.files.open_regular", full)
    rank.give_back(0, must=not before)

    assert rank.complete() == ([] if before else [marker])
    assert not rank.is_claimed(0)


def test_a_held_slot_is_claimed_from_the_start(rank: RankSpool) -> None:
    fill(rank, 1, NEW)
    marker = rank.claim(1)
    assert marker is not None
    rank.drop(1)

    rank.hold(marker)

    assert rank.is_claimed(1)
    assert rank.complete() == []
    rank.give_back(1)
    assert rank.complete() == [marker]


def test_a_dropped_slot_is_free(rank: RankSpool) -> None:
    fill(rank, 0, NEW)
    rank.claim(0)

    rank.drop(0)
    rank.drop(0)

    assert not rank.is_claimed(0)
    assert rank.complete() == []


def test_forgetting_gives_up_the_complete_slots_and_leaves_the_claimed_one(
    rank: RankSpool,
) -> None:
    for slot in range(3):
        fill(rank, slot, snapshot(save=slot + 1), must=slot == 1)
    rank.claim(2)

    rank.forget()

    assert rank.complete() == []
    assert rank.is_claimed(2)


def test_claims_of_a_dead_supervisor_are_recovered_as_they_were(rank: RankSpool) -> None:
    markers = [fill(rank, slot, snapshot(save=slot + 1), must=slot == 1) for slot in range(3)]
    for slot in (0, 1):
        rank.claim(slot)
    (rank.folder / "slot-x.claimed.json").write_text("{}")
    (rank.folder / "slot-5.claimed.json").write_text("{")

    rank.recover_claims()

    assert rank.complete() == markers
    assert not any(rank.is_claimed(slot) for slot in range(10))


def test_each_slot_goes_to_exactly_one_of_the_trainer_and_the_supervisor(
    children: Children,
) -> None:
    rounds = 400
    with memory_folder() as folder:
        rank = RankSpool(folder)
        board = rank.prepare()
        marker = fill(rank, 0, NEW)
        rank.withdraw(0)

        def supervisor() -> None:
            own = Board(folder / "board")
            for number in range(1, rounds + 1):
                while own.step != number:
                    os.sched_yield()
                got = rank.claim(0) is not None
                rank.drop(0)
                own.answered = 2 * number + got

        child = children.start(supervisor)
        won, turns = {True: 0, False: 0}, 0
        for number in range(1, rounds + 1):
            rank.publish(marker)
            board.step = number
            for _ in range(turns):
                pass
            withdrawn = rank.withdraw(0)
            wait_until(lambda n=number: board.answered // 2 == n, what="the supervisor")
            claimed = bool(board.answered % 2)
            assert withdrawn != claimed, f"in round {number} the slot went to both, or to none"
            # Whoever lost is given a better start, so that they meet.
            turns = turns * 9 // 10 if claimed else turns * 10 // 9 + 10
            won[claimed] += 1
        assert children.exit_code(child) == 0
        assert won[True] + won[False] == rounds


def test_a_marker_appears_all_at_once(children: Children) -> None:
    with memory_folder() as folder:
        rank = RankSpool(folder)
        board = rank.prepare()
        fill(rank, 0, NEW)

        def trainer() -> None:
            own = Board(folder / "board")
            number = 0
            while not own.request_number:
                number += 1
                fill(rank, 0, snapshot(save=1 + number % 2), facts={"padding": "x" * 20_000})

        child = children.start(trainer)
        for _ in range(300):
            (marker,) = rank.complete()
            assert marker.order in ((1, 1), (1, 2))
        board.ask(Request.SAVE_AND_STOP, Why.MANUAL)
        assert children.exit_code(child) == 0


# ---------------------------------------------------------------- rubbish

GOOD = {"slot": 0, "must": False, "moment": {"attempt": 1, "save": 2}, "images": [], "facts": {}}
RUBBISH = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[]",
    "null": b"null",
    "deep nesting": b"[" * 100_000,
    "an empty object": b"{}",
    "another slot's": json.dumps(GOOD | {"slot": 1}).encode(),
    "no slot": json.dumps(GOOD | {"slot": None}).encode(),
    "a slot that is text": json.dumps(GOOD | {"slot": "zero"}).encode(),
    "an endless slot": json.dumps(GOOD | {"slot": float("inf")}).encode(),
    "no moment": json.dumps(GOOD | {"moment": None}).encode(),
    "an empty moment": json.dumps(GOOD | {"moment": {}}).encode(),
    "a moment without a save": json.dumps(GOOD | {"moment": {"attempt": 1}}).encode(),
    "an attempt that is text": json.dumps(
        GOOD | {"moment": {"attempt": "one", "save": 1}}
    ).encode(),
    "an endless attempt": json.dumps(
        GOOD | {"moment": {"attempt": float("inf"), "save": 1}}
    ).encode(),
    "images that are a number": json.dumps(GOOD | {"images": 3}).encode(),
    "facts that are a number": json.dumps(GOOD | {"facts": 3}).encode(),
    **{
        f"no {key}": json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()
        for key in GOOD
    },
}


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
def test_a_rubbish_marker_is_no_slot(rank: RankSpool, content: bytes) -> None:
    (rank.folder / "slot-0.json").write_bytes(content)

    assert rank.complete() == []
    rank.claim(0)
    rank.recover_claims()
    assert rank.complete() == []


def test_the_marker_that_the_rubbish_is_made_from_is_one(rank: RankSpool) -> None:
    (rank.folder / "slot-0.json").write_text(json.dumps(GOOD))

    assert rank.complete() == [Marker(**GOOD)]  # type: ignore[arg-type]
    assert read_marker(rank.folder / "slot-0.json") == Marker(**GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["slot-x.json", "slot-10.json", "slot-.json", "xslot-0.json", ".slot-0.json.123"]
)
def test_a_file_of_another_name_is_no_marker(rank: RankSpool, name: str) -> None:
    fill(rank, 0, NEW)
    (rank.folder / "slot-0.json").rename(rank.folder / name)

    assert rank.complete() == []


# ---------------------------------------------------------------- messages


def test_a_message_is_taken_once(rank: RankSpool) -> None:
    rank.send("fetch.json", {"number": 1, "which": "best"})

    assert rank.take("fetch.json") == {"number": 1, "which": "best"}
    assert rank.take("fetch.json") is None


def test_an_attempt_begins_without_messages_and_with_the_complete_slots(rank: RankSpool) -> None:
    marker = fill(rank, 0, NEW)
    for name in ("restore.json", "fetch.json", "fetched.json"):
        rank.send(name, {"number": 1})
    rank.put_fetched_on_disk()
    rank.open_slot(rank.fetched_path, 100)

    board = rank.prepare()

    assert files(rank) == ["board", "slot-0", "slot-0.json"]
    assert rank.disk is not None
    assert list(rank.disk.iterdir()) == []
    assert rank.complete() == [marker]
    assert board.progress == 0


def test_a_message_with_numbers_that_json_lacks_is_not_sent(rank: RankSpool) -> None:
    with pytest.raises(ValueError, match="JSON"):
        rank.send("fetch.json", {"number": float("nan")})
    assert files(rank) == []


def test_a_message_to_nowhere_is_a_spool_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError):
        RankSpool(tmp_path / "gone").send("fetch.json", {})


# ---------------------------------------------------------------- who may use a spool


def test_a_spool_is_for_its_owner_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a" / "spool")
    before = os.umask(0)
    try:
        spool.open()
    finally:
        os.umask(before)

    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(spool.rank.folder.stat().st_mode) == 0o700
    spool.close()


def test_a_spool_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.mkdir()
    path.chmod(0o777)

    spool = Spool(path)
    spool.open()
    spool.close()

    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_spool_that_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.mkdir()
    os.chown(path, 54321, -1)
    path.chmod(0o777)

    with pytest.raises(SpoolError, match="somebody else"):
        Spool(path).open()

    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    assert list(path.iterdir()) == []


def test_a_link_in_the_place_of_a_spool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(SpoolError):
        Spool(tmp_path / "spool").open()

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("inner", ["", "deeper"])
def test_a_file_in_the_place_of_a_spool_is_refused(tmp_path: Path, inner: str) -> None:
    (tmp_path / "spool").touch()

    with pytest.raises(SpoolError):
        Spool(tmp_path / "spool" / inner).open()


def test_a_second_supervisor_is_refused_for_as_long_as_the_first_one_lives(
    tmp_path: Path,
) -> None:
    first, second = Spool(tmp_path / "spool"), Spool(tmp_path / "spool")
    first.open()

    with pytest.raises(SpoolTaken):
        second.open()
    first.close()
    second.open()

    with pytest.raises(SpoolTaken):
        first.open()
    second.close()


def test_the_lock_of_a_supervisor_that_was_killed_is_free(
    tmp_path: Path, children: Children
) -> None:
    path = tmp_path / "spool"
    ready, tell = os.pipe()

    def hold() -> None:
        own = Spool(path)
        own.open()
        os.write(tell, b"x")
        signal.pause()

    child = children.start(hold)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    os.close(tell)
    spool = Spool(path)
    with pytest.raises(SpoolTaken):
        spool.open()
    os.kill(child, 9)
    assert children.exit_code(child) == -9

    spool.open()
    assert is_locked(path / "lock")
    spool.close()


def test_a_second_trainer_is_refused_for_as_long_as_the_first_one_lives(rank: RankSpool) -> None:
    lock = rank.lock()

    with pytest.raises(SpoolTaken, match="RUNNER_SPOOL"):
        rank.lock()
    lock.close()

    rank.lock().close()


def test_looking_at_a_lock_does_not_take_it(rank: RankSpool) -> None:
    path = rank.folder / "lock"
    assert not is_locked(path)
    assert not path.exists()
    lock = rank.lock()
    assert is_locked(path)
    assert is_locked(path)
    lock.close()
    assert not is_locked(path)

    rank.lock().close()


def test_a_status_is_that_of_a_living_supervisor(tmp_path: Path) -> None:
    spool, outsider = Spool(tmp_path / "spool"), Spool(tmp_path / "spool")
    assert outsider.status() is None
    spool.open()
    assert outsider.status() is None

    spool.publish_status({"phase": "running"})

    assert outsider.status() == {"phase": "running"}
    assert spool.status() == {"phase": "running"}
    spool.close()
    assert outsider.status() is None


def test_a_removed_spool_is_gone_and_free(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    spool = Spool(tmp_path / "spool", disk=disk)
    spool.open()
    spool.write_plan({"slots": 2})
    spool.ask_to_stop()
    assert spool.rank.put_on_disk(0)
    fill(spool.rank, 0, NEW)
    assert read_json(spool.path / "plan.json") == {"slots": 2}
    assert len(list(disk.iterdir())) == 1

    spool.remove()

    assert not spool.path.exists()
    assert list(disk.iterdir()) == []
    again = Spool(tmp_path / "spool")
    again.open()
    again.close()


def test_a_run_has_the_same_spool_on_a_node_each_time(tmp_path: Path) -> None:
    root = str(tmp_path)
    path = spool_path("rul-fd001", "/runs", root)

    assert path == spool_path("rul-fd001", "/runs", root)
    assert path.parent == tmp_path
    assert path.name.startswith(f"runner-{os.geteuid()}-rul-fd001-")
    others = {
        spool_path("rul-fd002", "/runs", root),
        spool_path("rul-fd001", "/other", root),
        spool_path("rul-fd001", "s3://bucket/runs", root),
    }
    assert len({path, *others}) == 4


def test_a_spool_is_in_memory_where_there_is_memory_to_be_had() -> None:
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)

    assert (spool_path("run", "/runs").parent == memory) == usable


def test_owners_are_names_without_a_dash() -> None:
    assert new_owner() != new_owner()
    assert "-" not in new_owner()  # a staged directory's name ends with one


# ---------------------------------------------------------------- the memory of a slot


def test_the_memory_of_a_slot_is_reserved_before_it_is_used(rank: RankSpool) -> None:
    slot = open_slot(rank.slot_path(0), 1 << 20)

    status = rank.slot_path(0).stat()
    assert len(slot) == status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20
    assert stat.S_IMODE(status.st_mode) & 0o077 == 0


def test_a_slot_grows_and_never_shrinks(rank: RankSpool) -> None:
    path = rank.slot_path(0)
    open_slot(path, 10_000)[:5] = b"first"

    assert len(open_slot(path, 20_000)) == 20_000
    assert len(open_slot(path, 0)) == 20_000
    assert bytes(view_slot(path)[:5]) == b"first"


def test_a_slot_that_finds_no_memory_keeps_its_content(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", "1m") as disk:
        path = disk / "slot-0"
        open_slot(path, 500_000)[:5] = b"first"

        with pytest.raises(SpoolFull, match=r"2\.0 MB"):
            open_slot(path, 2_000_000)
        with pytest.raises(SpoolFull):
            open_slot(disk / "slot-1", 900_000)

        assert bytes(view_slot(path)[:5]) == b"first"
        assert len(open_slot(path, 500_000)) == 500_000


def test_a_full_spool_is_said_to_be_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", "64k") as disk:
        rank = RankSpool(disk)
        marker = fill(rank, 0, Snapshot(NEW.moment, {"state.json": b"{}"}))
        (disk / "ballast").write_bytes(bytes(40_000))

        with pytest.raises(SpoolFull):
            rank.publish(replace(marker, facts={"x": "x" * 40_000}))

        assert rank.complete() == [marker]
        assert files(rank) == ["ballast", "slot-0", "slot-0.json"]


@pytest.mark.parametrize("content", [None, b""])
def test_a_slot_that_is_missing_or_empty_cannot_be_read(
    rank: RankSpool, content: bytes | None
) -> None:
    if content is not None:
        rank.slot_path(0).write_bytes(content)

    with pytest.raises(SpoolError):
        view_slot(rank.slot_path(0))


def test_a_slot_can_be_a_file_on_disk(rank: RankSpool, tmp_path: Path) -> None:
    fill(rank, 0, OLD)

    assert rank.put_on_disk(0)

    assert rank.complete() == []  # its content is lost
    marker = fill(rank, 0, NEW)
    assert rank.put_on_disk(0)
    assert rank.complete() == [marker]
    assert read_slot(rank, marker) == NEW.files
    (target,) = (tmp_path / "disk").iterdir()
    assert target.stat().st_size == rank.slot_path(0).stat().st_size


def test_a_slot_that_is_claimed_is_not_moved_to_disk(rank: RankSpool, tmp_path: Path) -> None:
    fill(rank, 0, NEW)
    marker = rank.claim(0)
    assert marker is not None

    assert not rank.put_on_disk(0)

    assert read_slot(rank, marker) == NEW.files


def test_a_spool_on_a_file_system_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "memory", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)

        with pytest.raises(SpoolError, match=r"spool cannot be made: Read-only.*RUNNER_SPOOL_ROOT"):
            Spool(folder / "spool").open()


# ---------------------------------------------------------------- what a trainer may have put there


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that the other side may not see."""
    path = tmp_path / "outside" / "secret"
    path.parent.mkdir()
    path.write_text('{"slot": 0, "secret": true}')
    return path


def test_no_link_in_the_spool_is_followed(rank: RankSpool, outside: Path) -> None:
    before = outside.read_bytes()
    for name in ("slot-1.json", "facts.json", "slot-2.claimed.json", "fetched", "board"):
        (rank.folder / name).symlink_to(outside)
    (rank.folder / f".fetched.json.{os.getpid()}").symlink_to(outside)

    assert rank.complete() == rank.claimed() == []
    assert rank.read("facts.json") == {}
    with pytest.raises(OSError, match="symbolic links"):
        rank.open_slot(rank.folder / "fetched", 100)
    with pytest.raises(OSError, match="symbolic links"):
        Board(rank.folder / "board")
    rank.send("fetched.json", {"number": 1})

    assert rank.read("fetched.json") == {"number": 1}
    assert outside.read_bytes() == before


def test_a_slot_that_links_elsewhere_is_neither_read_nor_written_nor_deleted(
    rank: RankSpool, outside: Path, tmp_path: Path
) -> None:
    before = outside.read_bytes()
    (rank.folder / "slot-0").symlink_to(outside)
    (tmp_path / "disk").mkdir()

    rank.open_slot(rank.slot_path(0), 4096)[:4] = b"mine"
    RankSpool(rank.folder).remove_disk_slots()
    rank.remove_disk_slots()
    assert list((tmp_path / "disk").iterdir()) == []
    rank.slot_path(0).symlink_to(outside)  # in the folder on disk, which is the trainer's as well

    with pytest.raises(SpoolError, match="slot-0 cannot be read"):
        view_slot(rank.slot_path(0))
    with pytest.raises(OSError, match="symbolic links"):
        rank.open_slot(rank.slot_path(0), 4096)
    rank.remove_disk_slots()
    assert outside.read_bytes() == before


def test_a_pipe_in_the_spool_holds_nobody_up(rank: RankSpool) -> None:
    for name in ("slot-0.json", "slot-0", "lock", "points-000001-000000.jsonl"):
        os.mkfifo(rank.folder / name)

    assert rank.complete() == []
    with pytest.raises(SpoolError):
        view_slot(rank.slot_path(0))
    assert is_locked(rank.folder / "lock")  # nobody can tell, so it is not removed
    assert PointReader(rank.folder).take() == b""


def test_a_folder_is_given_away_and_not_what_links_in_it_lead_to(outside: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    folder = outside.parent / "given"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(outside.parent)

    give_to(folder, (65534, 65534))

    assert {path.lstat().st_uid for path in (folder, *folder.rglob("*"))} == {65534}
    assert outside.stat().st_uid == outside.parent.stat().st_uid == 0
