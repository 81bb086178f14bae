"""From the clouds' news to the loop's events, and who else may be on the machine."""

from __future__ import annotations

from pathlib import Path

from runner.notices import Advice, Preemption
from runner.spool import Spool, spool_path
from runner.supervisor.events import Hint, Notice
from runner.supervisor.listening import event_of, is_alone


def test_news_become_events_with_the_same_times() -> None:
    assert event_of(Preemption("aws", at=5.0, deadline=125.0)) == Notice(5.0, "aws", 125.0)
    assert event_of(Advice("aws", at=6.0)) == Hint(6.0, "aws")


def test_a_run_is_alone_while_no_other_is_live(tmp_path: Path) -> None:
    own, other = (Spool(spool_path(name, "a store", str(tmp_path))) for name in ("own", "other"))
    (tmp_path / "runner-of-no-spool").write_text("")
    own.open()
    assert is_alone(own.path)

    other.open()
    assert not is_alone(own.path)

    other.close()  # its supervisor is gone, and its spool still there
    assert other.path.exists()
    assert is_alone(own.path)
    own.close()
