"""Every error that this package raises on purpose, as one tree.

    RunnerError
    ├── UsageError                what the user gave is wrong: exit code 2, nothing written
    │   ├── JobError              the job file
    │   ├── ClusterError          a Kubernetes cluster refuses, or cannot be reached
    │   │   └── ClusterDenied     a permission is missing there
    │   ├── NobodyAnswers         a store that is down or read-only, or an address that is wrong
    │   └── UnknownName           a run, a checkpoint or a subset that does not exist
    ├── StoreError                the store refuses, is out of reach, or is full
    │   ├── NotFound              a key that is not there
    │   ├── RecordUnreadable      what is stored is not what was written there
    │   ├── StoreDenied           a permission is missing
    │   └── StoreUnfit            wrong bucket, region, endpoint, credentials or server
    ├── CheckpointError
    │   ├── CheckpointCorrupt     does not match its own manifest
    │   ├── CheckpointInvalid     a manifest that cannot be read or trusted
    │   └── NoValidCheckpoint     there are checkpoints, and none of them verifies
    ├── CaptureError              a value that cannot be saved; names its path
    ├── RestoreError              what was saved does not fit the live objects
    │   └── PositionError         the data changed, so the place in it cannot be found again
    ├── SpoolError                the spool is not usable
    │   ├── SpoolFull             no memory for a slot
    │   └── SpoolTaken            another process of the attempt has attached already
    ├── EngineError               the container engine refuses
    │   └── EngineGone            it does not answer
    ├── MetadataError             a cloud's metadata service is absent, or not understood
    ├── TrackerError              a tracker that cannot be told something
    │   └── TrackerRefused        and never can be
    ├── Abandoned                 a save that gave way to a newer one
    └── Fenced                    a newer attempt has the run: exit code 76

A message says where, what is wrong, and what to do next. Code branches on these types, never on
text.
"""

from __future__ import annotations


class RunnerError(Exception):
    """The root of all errors raised on purpose."""


class UsageError(RunnerError):
    """What the user gave is wrong; retrying cannot help."""


class JobError(UsageError):
    """A job file that cannot be obeyed.

    `problems` holds one line each: where (file and line), the key, what was expected.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class NobodyAnswers(UsageError):
    """Nobody takes what is to be stored: a server that is down, a file system that is read-only.

    It may pass, or be a mistake in the job: who asks must know.
    """


class UnknownName(UsageError):
    """A name that nothing of a kind answers to in a place: with the nearest ones that exist, or
    else with a remedy.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        known: list[str] | tuple[str, ...] = (),
        place: str = "",
        remedy: str = "",
    ) -> None:
        import difflib

        self.kind, self.name = kind, name
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else remedy and f"; {remedy}"
        super().__init__(" ".join(filter(None, ("there is no", kind, repr(name), place))) + hint)


class ClusterError(UsageError):
    """A Kubernetes cluster refuses, is not there, or has something else under this name."""


class ClusterDenied(ClusterError):
    """The cluster knows who asks, and does not allow it: `verb` on `resource` is missing."""

    def __init__(self, verb: str, resource: str, namespace: str) -> None:
        self.verb, self.resource, self.namespace = verb, resource, namespace
        super().__init__(
            f"the cluster denies access: the permission to {verb} {resource} in the namespace "
            f"{namespace} is missing; add it to a Role, as in k8s/base/rbac.yaml"
        )


class StoreError(RunnerError):
    """The store refuses, cannot be reached, or is full. Says nothing about what is in it."""


class NotFound(StoreError):
    """The store answers, and there is nothing under this key."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key} is not in the store")


class RecordUnreadable(StoreError):
    """The store answers, and what it has under a key of ours is nothing that we have written."""


class StoreDenied(StoreError):
    """The store knows who asks, and does not allow it. `action` is the permission missing."""

    def __init__(self, where: str, action: str, resource: str) -> None:
        self.where, self.action, self.resource = where, action, resource
        super().__init__(
            f"{where}: access is denied: the credentials lack {action} on {resource}; "
            "add it to the policy of their user or role, or to the bucket's"
        )


class StoreUnfit(StoreError):
    """The store cannot be used as it is set up, and asking again does not help."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where, self.problem, self.remedy = where, problem, remedy
        super().__init__(f"{where}: {problem}; {remedy}")


class CheckpointError(RunnerError):
    """Something is wrong with a saved checkpoint."""


class CheckpointCorrupt(CheckpointError):
    """A committed checkpoint does not match its own manifest."""

    def __init__(self, checkpoint: str, problem: str) -> None:
        self.checkpoint, self.problem = checkpoint, problem
        super().__init__(f"checkpoint {checkpoint} is corrupt: {problem}")


class CheckpointInvalid(CheckpointCorrupt):
    """A manifest that cannot be read, is of another version, or names files it must not."""


class NoValidCheckpoint(CheckpointError):
    """The run has checkpoints, and none of them verifies. It is never begun anew in silence."""


class CaptureError(RunnerError):
    """A value in the state that cannot be saved.

    `path` names it as the user would write it: `optimizer.param_groups[0]['hook']`.
    """

    def __init__(self, path: str, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(f"{path} {problem}")


class RestoreError(RunnerError):
    """What was saved does not fit the live objects; nothing is put in place half."""


class PositionError(RestoreError):
    """The data or its order changed, so the place in it cannot be found again exactly."""


class SpoolError(RunnerError):
    """The spool directory is missing, foreign, or not usable."""


class SpoolFull(SpoolError):
    """There is no memory for a slot of the size that the state needs."""


class SpoolTaken(SpoolError):
    """Another process of the same attempt has attached already."""


class EngineError(RunnerError):
    """The container engine refuses what it is asked for.

    `status` is that of its answer, 0 if there was none.
    """

    def __init__(self, action: str, reason: str, status: int = 0) -> None:
        self.action, self.reason, self.status = action, reason, status
        super().__init__(f"the container engine cannot {action}: {reason}")


class EngineGone(EngineError):
    """The container engine does not answer; it may come back."""


class MetadataError(RunnerError):
    """A cloud's metadata service is not there, or what it answers cannot be understood."""


class TrackerError(RunnerError):
    """A tracker or its registry is not reached, or cannot do what is asked. Never ends a run."""


class TrackerRefused(TrackerError):
    """What was sent will not be taken another time either."""


class Abandoned(RunnerError):
    """A save gave way to that of a newer state; what it held is still in its slot."""


class Fenced(RunnerError):
    """A newer attempt, of another supervisor, has the run. Nothing may be written any more."""

    def __init__(self, run_id: str, attempt: int, owner: str) -> None:
        self.run_id, self.attempt, self.owner = run_id, attempt, owner
        super().__init__(
            f"run {run_id}: attempt {attempt} belongs to another supervisor ({owner}); "
            "this one stops writing"
        )


_NO_OUTAGES = (NotFound, RecordUnreadable, StoreDenied, StoreUnfit)


def is_outage(error: BaseException) -> bool:
    """Whether a store is out of reach, full or out of order, and may not be so for ever."""
    if isinstance(error, NobodyAnswers):
        return True
    return isinstance(error, StoreError) and not isinstance(error, _NO_OUTAGES)
