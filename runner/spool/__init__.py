"""The spool: the only thing that trainer and supervisor share, and all of their protocol.

    <spool>/                     0700, on memory-backed storage
      lock                       held by the supervisor for as long as it lives
      plan.json                  what the trainer needs to know of the job
      stop                       put there by `runner stop`
      stdout, stderr             pipes for what a trainer in a container prints
      rank-00000/
        lock                     held by the trainer that attached
        board                    one mapped page: progress one way, requests the other
        slot-0, slot-1           one snapshot each: the images of the checkpoint's files
        slot-0.json              marker: the slot is complete, and this is what it holds
        slot-0.claimed.json      the same, while the supervisor persists or restores from it
        restore.json             the claimed slot that the next attempt begins from
        fetch.json, fetched.json a request for a saved checkpoint, and the answer to it
        fetched                  that checkpoint, until it is loaded; on disk it is a link, as slots

A rename hands a slot over. The trainer renames a marker into place when its copy has ended, the
supervisor claims it by renaming it away, and gives it back or removes it. Before the trainer
overwrites a slot it unlinks the marker; if that is gone, the slot is claimed and it takes another.
A slot without a marker does not exist.
"""

from __future__ import annotations

from runner.spool.files import Owner, give_to, is_locked, read_json
from runner.spool.rank import ALL_SLOTS, FACTS_FILE, RankSpool
from runner.spool.slots import Marker, Weights, is_cut_short, open_slot, read_marker, view_slot
from runner.spool.whole import SPOOL_PREFIX, Spool, new_owner, spool_path

__all__ = [
    "ALL_SLOTS",
    "FACTS_FILE",
    "SPOOL_PREFIX",
    "Marker",
    "Owner",
    "RankSpool",
    "Spool",
    "Weights",
    "give_to",
    "is_cut_short",
    "is_locked",
    "new_owner",
    "open_slot",
    "read_json",
    "read_marker",
    "spool_path",
    "view_slot",
]
