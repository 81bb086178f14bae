"""Where checkpoints live."""

from runner.store.base import Content, Part, Staging, Store, Stored
from runner.store.local import DirectoryStore

__all__ = ["Content", "DirectoryStore", "Part", "Staging", "Store", "Stored", "open_store"]


def open_store(location: str) -> Store:
    """The store at a location of a job file: a directory, absolute by now."""
    from pathlib import Path

    return DirectoryStore(Path(location))
