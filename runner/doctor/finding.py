"""One line of `runner doctor`: what was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """How it is. Only FAIL means that a run would fail, or would lose what it has done."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """`facts` says what is so, `remedy` what to do next where something is to be done."""

    check: str
    verdict: Verdict
    facts: str
    remedy: str = ""

    def as_line(self) -> str:
        """One line for people, whatever an error's text was."""
        text = "; ".join(filter(None, (self.facts, self.remedy)))
        return f"{self.verdict.value:<5} {self.check:<19} {' '.join(text.split())}"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "check": self.check,
            "verdict": self.verdict.value,
            "facts": self.facts,
            "remedy": self.remedy,
        }


def ok(check: str, facts: str) -> Finding:
    return Finding(check, Verdict.OK, facts)


def warn(check: str, facts: str, remedy: str = "") -> Finding:
    return Finding(check, Verdict.WARN, facts, remedy)


def fail(check: str, facts: str, remedy: str = "") -> Finding:
    return Finding(check, Verdict.FAIL, facts, remedy)


def size_text(nbytes: float) -> str:
    """A size for people: decimal units, as throughputs have them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if nbytes >= 99.5 else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
