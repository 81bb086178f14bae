"""What the trainer's time goes into, on the board: every moment since `attach` is of one account.

    startup ─▶ restore ─▶ startup ─▶ steps · stall · steps · stall ─▶ validation ─▶ steps …

The supervisor reads it whenever it wants to know, also when the trainer is dead by then. Entering
an account costs about a microsecond.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from runner.board import Account, Board


class Accounts:
    """One account is open at a time; begins with `STARTUP`."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.current = Account.STARTUP
        self._since = time.monotonic_ns()
        self._spent_ns = [0] * len(Account)
        board.account, board.account_ns = int(self.current), self._since

    def enter(self, account: Account) -> float:
        """Open an account and close the one before; the seconds of the stretch that has ended."""
        now, board = time.monotonic_ns(), self._board
        stretch, before = now - self._since, self.current
        board.account_ns = 0  # whoever reads now looks again
        self._spent_ns[before] += stretch
        setattr(board, _WORDS[before], self._spent_ns[before] // 1000)
        board.account = int(account)
        self.current, self._since = account, now
        board.account_ns = now
        return stretch / 1e9

    @contextlib.contextmanager
    def during(self, account: Account) -> Iterator[None]:
        """Open an account for a while."""
        before = self.current
        self.enter(account)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self, account: Account) -> float:
        """What has gone into an account, without a stretch that is still open."""
        return self._spent_ns[account] / 1e9


_WORDS = {account: account.word for account in Account}
