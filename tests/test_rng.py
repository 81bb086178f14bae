"""The random number generators of the process."""

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import RestoreError
from runner.training.rng import (
    KeepStreams,
    capture_rng,
    derive_seed,
    draw_seed,
    generator_state,
    restore_rng,
    same_state,
    seed_process,
    set_generator_state,
)

GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "random": lambda: random.Random(3),
    "numpy PCG64": lambda: np.random.default_rng(3),
    "numpy MT19937": lambda: np.random.Generator(np.random.MT19937(3)),
    "numpy Philox": lambda: np.random.Generator(np.random.Philox(3)),
    "numpy RandomState": lambda: np.random.RandomState(3),
}


def draw() -> list[float]:
    # Normal numbers are made in pairs, and the second one waits in the state.
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(()).item(),
        torch.randn(3).sum().item(),
    ]


def draw_from(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (int, float, str, bytes, bool, np.ndarray)


def test_what_was_captured_is_drawn_again() -> None:
    draw()
    state = capture_rng()
    first = draw()
    seed_process(derive_seed("garbage"))

    restore_rng(state)

    assert draw() == first


def test_a_captured_state_is_plain_and_does_not_move_with_the_generators() -> None:
    state = capture_rng()
    assert is_plain(state)
    first = draw()

    draw()
    restore_rng(state)

    assert draw() == first


@pytest.mark.parametrize("broken", ["python", "numpy", "torch"])
def test_a_state_that_does_not_fit_changes_nothing(broken: str) -> None:
    foreign = {
        **capture_rng(),
        broken: {"python": (9, (), None), "numpy": {}, "torch": b"?"}[broken],
    }
    seed_process(derive_seed("mine"))
    before = capture_rng()

    with pytest.raises(RestoreError, match="does not fit"):
        restore_rng(foreign)

    assert same_state(capture_rng(), before)


def test_another_number_of_cuda_devices_sets_those_that_both_have(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = {0: b"zero", 1: b"one"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(held))
    monkeypatch.setattr(
        torch.cuda,
        "get_rng_state",
        lambda device: torch.frombuffer(bytearray(held[device]), dtype=torch.uint8),
    )
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, device: held.update({device: state.numpy().tobytes()}),
    )
    saved = capture_rng()
    assert saved["cuda"] == [b"zero", b"one"]

    held.clear()
    held[0] = b"other"
    with caplog.at_level(logging.WARNING):
        restore_rng(saved)

    assert held == {0: b"zero"}
    assert "saved for 2 CUDA devices and 1 are visible" in caplog.text


def test_a_block_that_keeps_the_streams_may_draw_and_fail() -> None:
    def fail() -> None:
        with KeepStreams():
            draw()
            seed_process(derive_seed("anything"))
            raise ZeroDivisionError

    before = capture_rng()

    with pytest.raises(ZeroDivisionError):
        fail()

    assert same_state(capture_rng(), before)


def test_seeding_the_process_decides_all_that_is_drawn() -> None:
    seed = derive_seed("pass", 1, 2)
    number = seed_process(seed)
    first = draw()
    draw()

    assert seed_process(seed) == number
    assert draw() == first
    seed_process(derive_seed("pass", 1, 3))
    assert not set(draw()) & set(first)


def test_a_script_that_changed_numpys_bit_generator_is_seeded_and_restored_too() -> None:
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        seed_process(derive_seed("x"))
        state, first = capture_rng(), np.random.rand()
        seed_process(derive_seed("x"))
        assert np.random.rand() == first
        restore_rng(state)
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(original)


@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_a_generator_continues_where_its_state_was_taken(make: Any) -> None:
    generator, other = make(), make()
    draw_from(generator)
    state = generator_state(generator)
    assert is_plain(state)
    following = [draw_from(generator) for _ in range(3)]

    set_generator_state(other, state)

    assert [draw_from(other) for _ in range(3)] == following
    assert not same_state(generator_state(other), state)


SPAWNING: dict[str, Callable[[], np.random.Generator]] = {
    "a number": lambda: np.random.default_rng(3),
    "several numbers": lambda: np.random.default_rng([3, 1 << 40]),
    "an array": lambda: np.random.default_rng(np.arange(3)),
    "a child of another": lambda: np.random.default_rng(3).spawn(2)[1],
    "no seed": np.random.default_rng,
    "Philox": lambda: np.random.Generator(np.random.Philox(3)),
}


@pytest.mark.parametrize("make", SPAWNING.values(), ids=SPAWNING)
def test_children_of_a_generator_are_not_made_twice(
    make: Callable[[], np.random.Generator],
) -> None:
    generator, behind, ahead = make(), make(), make()
    generator.spawn(2)
    state = generator_state(generator)
    ahead.spawn(5)
    following = [child.random() for child in generator.spawn(3)]
    assert is_plain(state)
    for other in (behind, ahead, generator):
        set_generator_state(other, state)

        assert same_state(generator_state(other), state)
        children = other.spawn(3)
        assert [child.random() for child in children] == following
        assert len({*following, children[0].spawn(1)[0].random()}) == 4


def test_generators_with_one_seed_sequence_still_share_it() -> None:
    def make() -> tuple[np.random.Generator, np.random.Generator]:
        sequence = np.random.SeedSequence(3)
        return np.random.default_rng(sequence), np.random.default_rng(sequence)

    one, other = make()
    one.spawn(2)
    states = [generator_state(one), generator_state(other)]
    following = [g.spawn(1)[0].random() for g in (one, other)]

    one, other = make()
    for generator, state in zip((one, other), states, strict=True):
        set_generator_state(generator, state)

    assert [g.spawn(1)[0].random() for g in (one, other)] == following


def test_a_state_without_a_seed_sequence_leaves_the_children_as_they_are() -> None:
    """States of earlier versions are numpy's own alone."""
    generator, untouched = np.random.default_rng(3), np.random.default_rng(3)
    generator.spawn(2), untouched.spawn(2)
    set_generator_state(generator, np.random.default_rng(4).bit_generator.state)
    assert generator.random() == np.random.default_rng(4).random()
    assert generator.spawn(1)[0].random() == untouched.spawn(1)[0].random()


def test_a_generator_whose_seeds_numpy_does_not_count_is_saved_without_them() -> None:
    class OfTheirOwn(np.random.SeedSequence):
        pass

    seeds: list[Any] = [OfTheirOwn(3), np.random.SeedSequence(["0x3"])]
    for seed in seeds:
        generator = np.random.default_rng(seed)
        assert generator_state(generator) == generator.bit_generator.state


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("torch", "random"),
        ("torch", "numpy PCG64"),
        ("random", "torch"),
        ("random", "numpy RandomState"),
        ("numpy PCG64", "numpy Philox"),
        ("numpy PCG64", "torch"),
        ("numpy RandomState", "numpy PCG64"),
        ("numpy RandomState", "random"),
    ],
)
def test_a_generator_refuses_the_state_of_another_kind(kind: str, other: str) -> None:
    with pytest.raises(RestoreError, match="does not fit"):
        set_generator_state(GENERATORS[kind](), generator_state(GENERATORS[other]()))


@given(
    st.lists(st.one_of(st.integers(), st.text(), st.binary())),
    st.lists(st.one_of(st.integers(), st.text(), st.binary())),
)
def test_two_keys_give_the_same_seed_only_if_they_are_equal(a: list[Any], b: list[Any]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"), [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), (("1",), (b"1",)), ((1, 2), (12,))]
)
def test_keys_that_look_alike_are_told_apart(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert derive_seed(*a) != derive_seed(*b)


def test_a_seed_is_the_same_in_every_process_and_version() -> None:
    # Written down: a run that was saved by an earlier version must find its streams again.
    expected = "0c85c69d69e66735ec5f9a693b6facf844096b114b9777d0a4803465556c49f5"
    assert derive_seed("batch", 17, 3, -1).hex() == expected
    code = (
        "from runner.training.rng import derive_seed; print(derive_seed('batch', 17, 3, -1).hex())"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        )
        assert output.stdout.strip() == expected


def test_the_drawn_seed_is_what_a_data_loader_draws() -> None:
    torch.manual_seed(5)
    iterator = iter(torch.utils.data.DataLoader([1, 2]))  # type: ignore[arg-type]
    after_loader = torch.get_rng_state()
    torch.manual_seed(5)

    seed = draw_seed()

    assert seed == iterator._base_seed
    assert torch.equal(torch.get_rng_state(), after_loader)
