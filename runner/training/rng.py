"""The random number generators of the process: read them, set them, keep them apart.

A loop is exact only if its streams (`random`, numpy's global one, torch's on the CPU) see the same
draws in an undisturbed and in a resumed run. So whatever loads data draws from streams of its own,
seeded with `derive_seed`, inside `KeepStreams`. All states are plain values (tuples, dicts,
numbers, numpy arrays, and bytes for torch), so that they can be stored without pickle.
"""

from __future__ import annotations

import hashlib
import logging
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from runner.errors import RestoreError

log = logging.getLogger(__name__)

Generator: TypeAlias = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
GENERATOR_TYPES = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

SEED_BYTES = 32
_SEEDS = "seed_seq"  # beside what a numpy bit generator's state has
_SPAWNED = "n_children_spawned"


class Streams(NamedTuple):
    """The states of the process's CPU streams, as the libraries give them (fast to set again)."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: torch.Tensor


def capture_streams() -> Streams:
    """The states of `random`, numpy's global generator and torch's CPU generator; about 35 µs."""
    return Streams(
        random.getstate(),
        # Not the legacy tuple: that one knows MT19937 only, and `set_bit_generator` exists.
        np.random.get_state(legacy=False),
        torch.default_generator.get_state(),
    )


def restore_streams(streams: Streams) -> None:
    """Put the CPU streams back to where `capture_streams` found them; about 35 µs."""
    random.setstate(streams.python)
    np.random.set_state(streams.numpy)
    torch.default_generator.set_state(streams.torch)


class KeepStreams:
    """A block after which the CPU streams are as they were before it, whatever it drew."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = capture_streams()

    def __exit__(self, *_: object) -> None:
        restore_streams(self._before)


def capture_rng() -> dict[str, Any]:
    """All generators of the process, as plain values.

    Keys: `python`, `numpy`, `torch` (bytes) and `cuda`, a list with the bytes of each visible
    device; it is empty as long as the process has not used CUDA. Nothing is drawn or changed.
    """
    streams = capture_streams()
    return {
        "python": streams.python,
        "numpy": streams.numpy,
        "torch": _to_bytes(streams.torch),
        "cuda": [_to_bytes(torch.cuda.get_rng_state(i)) for i in range(_cuda_devices_in_use())],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set all generators of the process to what `capture_rng` returned.

    With another number of CUDA devices, those that both have are set, and a warning is logged.
    Raises `RestoreError` if a state does not fit; the CPU streams are then as they were.
    """
    before = capture_streams()
    try:
        restore_streams(Streams(state["python"], state["numpy"], _to_tensor(state["torch"])))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        restore_streams(before)
        raise RestoreError(
            f"the saved state of the random number generators does not fit: {error}; "
            "was it saved with another version of Python, numpy or torch?"
        ) from error
    _restore_cuda(state.get("cuda", ()))


def _cuda_devices_in_use() -> int:
    """Asking a process that has not used CUDA for its state would create a context: not done."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.device_count() if in_use else 0


def _restore_cuda(saved: Sequence[bytes]) -> None:
    if not saved:
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present != len(saved):
        log.warning(
            "random number generators were saved for %d CUDA devices and %d are visible: "
            "the first %d are set, randomness on the device will not be the same",
            len(saved),
            present,
            min(len(saved), present),
        )
    for device, state in zip(range(present), saved, strict=False):
        torch.cuda.set_rng_state(_to_tensor(state), device)


def generator_state(generator: Generator) -> Any:
    """The state of one generator object as a plain value (bytes for a `torch.Generator`)."""
    if isinstance(generator, torch.Generator):
        return _to_bytes(generator.get_state())
    if isinstance(generator, np.random.Generator):
        seeds = _seeds_of(generator.bit_generator)
        return dict(generator.bit_generator.state) | ({} if seeds is None else {_SEEDS: seeds})
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_generator_state(generator: Generator, state: Any) -> None:
    """Set one generator to what `generator_state` returned.

    Raises `RestoreError` if the state is that of another kind of generator.
    """
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(_to_tensor(state))
        elif isinstance(generator, np.random.Generator):
            state = dict(state)
            seeds = state.pop(_SEEDS, None)  # states of earlier versions have none
            generator.bit_generator.state = state
            if seeds is not None:
                _set_seeds(generator.bit_generator, seeds)
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        else:
            generator.setstate(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RestoreError(
            f"the saved state does not fit a {type(generator).__module__}."
            f"{type(generator).__name__}: {error}; give the loader the kind of generator it had"
        ) from error


def _seeds_of(generator: np.random.BitGenerator) -> dict[str, Any] | None:
    """What `spawn` makes children of, as plain values; None if that is no plain SeedSequence."""
    sequence = generator.seed_seq
    if type(sequence) is not np.random.SeedSequence:
        return None
    entropy: Any = sequence.entropy
    several = isinstance(entropy, Iterable)
    words = list(entropy) if several else [entropy]
    if not all(isinstance(word, int | np.integer) for word in words):
        return None
    return {
        "entropy": list(map(int, words)) if several else int(words[0]),
        "spawn_key": tuple(map(int, sequence.spawn_key)),
        "pool_size": sequence.pool_size,
        _SPAWNED: sequence.n_children_spawned,
    }


def _set_seeds(generator: Any, saved: Mapping[str, Any]) -> None:
    """Have `spawn` go on where it was: in the live sequence, as others may share it, if it is only
    behind. numpy 1 knows no other way, and leaves one that is not as it is."""
    live = _seeds_of(generator)
    if live == saved:
        return
    if live is not None and live | {_SPAWNED: saved[_SPAWNED]} == saved:
        behind = saved[_SPAWNED] - live[_SPAWNED]
        if behind > 0:
            generator.seed_seq.spawn(behind)
            return
    # What a pickle of the generator does; that of numpy 1 has no sequence in it.
    if isinstance(generator.__reduce__()[-1], tuple):
        generator.__setstate__((generator.state, np.random.SeedSequence(**saved)))


def same_state(a: Any, b: Any) -> bool:
    """Whether two states from `generator_state` are equal (they may hold arrays)."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def derive_seed(*key: int | str | bytes) -> bytes:
    """32 bytes that depend on every part of the key, and on nothing else.

    Equal in every process, whatever `PYTHONHASHSEED` is. Parts are tagged with their type and
    length, so that no two keys are encoded alike.
    """
    encoded = bytearray()
    for part in key:
        data = part if isinstance(part, bytes) else str(part).encode()
        encoded += struct.pack("<cQ", type(part).__name__[:1].encode(), len(data)) + data
    return hashlib.blake2b(encoded, digest_size=SEED_BYTES).digest()


def seed_process(seed: bytes) -> int:
    """Seed the CPU streams with the 32 bytes of `derive_seed`; about 15 µs.

    Returns the integer (64 bits) that `random` was seeded with. CUDA is left alone: the process may
    be a forked loader worker, which must not touch it.
    """
    python, torch_seed, *words = struct.unpack("<QQ4I", seed)
    random.seed(python)
    torch.default_generator.manual_seed(torch_seed)
    try:
        np.random.seed(words)
    except TypeError:  # the script has put another bit generator in the place of MT19937
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        generator.state = type(generator)(words).state
    return int(python)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """One draw, the same that a `DataLoader` makes for the base seed of its workers."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _to_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
