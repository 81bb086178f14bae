"""C-MAPSS files: where they are found, what is refused and how it is named, windows over them."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from jobs.rul import data as cmapss
from jobs.rul import nasa, synthetic
from jobs.rul.data import DataError, DataOutOfReach, Engine, Statistics, Windows

ROW = re.compile(rb"\d+ \d+ -?\d+\.\d{4} -?\d+\.\d{4} \d+\.0( -?\d+(\.\d{1,4})?){21}  ")
TRUTH_ROW = re.compile(rb"\d+ ")
NOWHERE = "http://127.0.0.1:9/no-server-here.zip"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache, or sees the user's choice of data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RUL_DATA", raising=False)
    return tmp_path / "cache" / "runner" / "cmapss"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound FD001 of four engines."""
    synthetic.write(tmp_path / "data", "FD001", engines=4)
    return tmp_path / "data"


@pytest.fixture
def lines() -> list[str]:
    """What `announce` was given."""
    return []


@pytest.fixture(scope="session")
def real_folder() -> Path:
    named = os.environ.get("RUL_DATA", "")
    if not named or named == "synthetic":
        pytest.skip("RUL_DATA does not name a folder with NASA's files")
    return Path(named)


# --- The generator ---


@pytest.mark.parametrize("subset", cmapss.SUBSETS)
def test_the_generator_writes_nasas_format(tmp_path: Path, subset: str) -> None:
    synthetic.write(tmp_path, subset, engines=3)

    assert_nasas_format(tmp_path, subset)
    read = cmapss.read_subset(tmp_path, subset, "folder")
    assert (len(read.train), len(read.test), len(read.truth)) == (3, 3, 3)


def test_the_generator_always_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthetic.write(tmp_path / name, "FD002", engines=3)

    for file in cmapss.file_names("FD002"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_generator_has_conditions_and_short_engines_like_nasas_files(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "FD004", engines=5)

    read = cmapss.read_subset(tmp_path, "FD004", "folder")

    assert len(Statistics.fit(read.train).centers) == 6
    assert min(len(engine.sensors) for engine in read.test) < 30


@pytest.mark.real_data
def test_nasas_own_files_have_the_format_that_is_tested_here(real_folder: Path) -> None:
    assert_nasas_format(real_folder, "FD001")


def assert_nasas_format(folder: Path, subset: str) -> None:
    for file in cmapss.file_names(subset):
        content = (folder / file).read_bytes()
        assert content.endswith(b"\n")
        pattern = TRUTH_ROW if file.startswith("RUL") else ROW
        wrong = [line for line in content.split(b"\n")[:-1] if not pattern.fullmatch(line)]
        assert wrong == []


# --- What is wrong with a file is said with its name and line ---


def field(line: int, column: int, value: str) -> Callable[[list[str]], list[str]]:
    """A change of one field; lines count from 1, columns from 0."""

    def change(lines: list[str]) -> list[str]:
        fields = lines[line - 1].split()
        fields[column] = value
        return [*lines[: line - 1], " ".join(fields), *lines[line:]]

    return change


def without(line: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: lines[: line - 1] + lines[line:]


BAD_FILES: dict[str, tuple[str, Callable[[list[str]], list[str]], str]] = {
    "missing column": (
        "train_FD001.txt",
        lambda lines: [*lines[:4], lines[4].rsplit(maxsplit=1)[0], *lines[5:]],
        "train_FD001.txt:5: expected 26 columns, found 25",
    ),
    "column too many": (
        "test_FD001.txt",
        lambda lines: [lines[0] + " 1.0", *lines[1:]],
        "test_FD001.txt:1: expected 26 columns, found 27",
    ),
    "text in a number": (
        "train_FD001.txt",
        field(9, 7, "15x9.7"),
        "train_FD001.txt:9: sensor 3 is not a number: '15x9.7'",
    ),
    "text in a setting": (
        "train_FD001.txt",
        field(2, 4, "low"),
        "train_FD001.txt:2: setting 3 is not a number: 'low'",
    ),
    "not a number at all": (
        "test_FD001.txt",
        field(3, 25, "nan"),
        "test_FD001.txt:3: sensor 21 is not a number: 'nan'",
    ),
    "infinite": (
        "train_FD001.txt",
        field(3, 5, "1e999"),
        "train_FD001.txt:3: sensor 1 is not a number: '1e999'",
    ),
    "bytes that are no text": (
        "train_FD001.txt",
        field(1, 6, "64\udcff"),
        "train_FD001.txt:1: sensor 2 is not a number: '64\ufffd'",
    ),
    "gap in the cycles": (
        "train_FD001.txt",
        without(7),
        "train_FD001.txt:7: engine 1: cycle 8 follows cycle 6, expected 7",
    ),
    "cycle given twice": (
        "train_FD001.txt",
        lambda lines: [*lines[:3], lines[2], *lines[3:]],
        "train_FD001.txt:4: engine 1: cycle 3 follows cycle 3, expected 4",
    ),
    "broken cycle": (
        "train_FD001.txt",
        field(3, 1, "2.5"),
        "train_FD001.txt:3: engine 1: cycle 2.5 follows cycle 2, expected 3",
    ),
    "first cycle missing": (
        "test_FD001.txt",
        without(1),
        "test_FD001.txt:1: engine 1: the first cycle is 2, expected 1",
    ),
    "unknown order of engines": (
        "train_FD001.txt",
        field(1, 0, "3"),
        "train_FD001.txt:1: engine 3 follows engine none, expected 1",
    ),
    "engine left out": (
        "train_FD001.txt",
        lambda lines: [line for line in lines if not line.startswith("1 ")],
        "train_FD001.txt:1: engine 2 follows engine none, expected 1",
    ),
    "no rows": ("train_FD001.txt", lambda _: [""], "train_FD001.txt:1: the file has no rows"),
    "truth too short": (
        "RUL_FD001.txt",
        without(4),
        "RUL_FD001.txt:3: the file ends after 3 rows; there are 4 engines in test_FD001.txt",
    ),
    "truth too long": (
        "RUL_FD001.txt",
        lambda lines: [*lines[:4], "12 ", ""],
        "RUL_FD001.txt:5: more rows than the 4 engines in test_FD001.txt",
    ),
    "truth with two columns": (
        "RUL_FD001.txt",
        lambda lines: ["12 13", *lines[1:]],
        "RUL_FD001.txt:1: expected 1 columns, found 2",
    ),
    "truth negative": (
        "RUL_FD001.txt",
        lambda lines: [*lines[:2], "-1", *lines[3:]],
        "RUL_FD001.txt:3: remaining cycles must not be negative, found -1",
    ),
    "truth empty": (
        "RUL_FD001.txt",
        lambda _: [],
        "RUL_FD001.txt:1: the file ends after 0 rows; there are 4 engines in test_FD001.txt",
    ),
}


@pytest.mark.parametrize(("file", "change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_its_line(
    folder: Path, file: str, change: Callable[[list[str]], list[str]], message: str
) -> None:
    good = (folder / file).read_text(encoding="ascii").split("\n")
    (folder / file).write_bytes("\n".join(change(good)).encode("ascii", "surrogateescape"))

    with pytest.raises(DataError) as error:
        cmapss.load("FD001", str(folder))

    assert str(error.value) == f"{folder}/{message}"


def test_blank_lines_are_passed_over_and_counted(folder: Path) -> None:
    file = folder / "train_FD001.txt"
    rows = file.read_text(encoding="ascii").split("\n")
    file.write_text("\n".join(["", "  ", *rows, ""]), encoding="ascii")
    assert len(cmapss.load("FD001", str(folder)).train) == 4

    file.write_text("\n".join(["", "  ", "1 1 2", *rows]), encoding="ascii")
    with pytest.raises(DataError, match=r"train_FD001.txt:3: expected 26 columns"):
        cmapss.load("FD001", str(folder))


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(DataError, match=r"unknown subset 'FD005': there are FD001, .*FD004"):
        cmapss.load("FD005", "synthetic")


# --- Where the files come from ---


def test_params_come_before_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.write(tmp_path / "other", "FD001", engines=2)
    monkeypatch.setenv("RUL_DATA", str(tmp_path / "other"))

    assert len(cmapss.load("FD001", str(folder)).train) == 4
    assert len(cmapss.load("FD001").train) == 2


@pytest.mark.parametrize("where", ["params.data", "RUL_DATA"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "absent is not a folder"), ("empty", "train_FD001.txt: No such file")],
)
def test_a_folder_that_was_named_is_never_replaced_by_made_up_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    where: str,
    name: str,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("RUL_DATA", str(tmp_path / name) if where == "RUL_DATA" else "synthetic")
    data = str(tmp_path / name) if where == "params.data" else None

    with pytest.raises(DataError, match=message):
        cmapss.load("FD001", data, announce=lines.append)

    assert lines == []


def test_offline_the_generator_is_used_and_announced_in_one_line(
    lines: list[str], own_cache: Path
) -> None:
    read = cmapss.load("FD002", engines=3, url=NOWHERE, announce=lines.append)

    assert (read.source, len(read.train)) == ("synthetic", 3)
    assert len(lines) == 2
    assert lines[0].startswith("downloading ")
    assert lines[1].startswith("SYNTHETIC DATA, not NASA's, is used for FD002 (NASA's files cannot")
    assert "\n" not in lines[1]
    assert not own_cache.exists()


def test_a_run_stays_with_what_it_began_with(lines: list[str]) -> None:
    again = cmapss.load(
        "FD001", began_with="synthetic", engines=2, url=NOWHERE, announce=lines.append
    )
    assert again.source == "synthetic"
    assert lines == ["SYNTHETIC DATA, not NASA's, is used for FD001 (the run began with it)"]

    for source in ("nasa", "folder"):
        with pytest.raises(DataOutOfReach, match="the run began with other data"):
            cmapss.load("FD001", began_with=source, url=NOWHERE, announce=lines.append)


class Site:
    """A local stand-in for NASA's site. Serves `content` and counts the requests."""

    def __init__(self) -> None:
        self.content, self.requests = b"", 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(site.content)))
                self.end_headers()
                self.wfile.write(site.content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/CMAPSS.zip"


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def as_nasa_packs(files: dict[str, bytes]) -> bytes:
    return zipped({"6. Turbofan Engine/CMAPSSData.zip": zipped(files)})


@pytest.fixture
def published(folder: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The site serves the files of `folder`, whose sums are the known ones."""
    files = {name: (folder / name).read_bytes() for name in cmapss.file_names("FD001")}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(nasa, "KNOWN_SHA256", sums)
    site.content = as_nasa_packs({"readme.txt": b"hello", **files})
    return files


def test_the_download_is_checked_and_cached(
    site: Site, published: dict[str, bytes], own_cache: Path, lines: list[str]
) -> None:
    first = cmapss.load("FD001", url=site.url, announce=lines.append)
    second = cmapss.load("FD001", url=NOWHERE, announce=lines.append)

    assert (first.source, second.source, site.requests) == ("nasa", "nasa", 1)
    assert first.sha256 == second.sha256
    assert {file.name: file.read_bytes() for file in own_cache.iterdir()} == published
    assert lines == [f"downloading {site.url} into {own_cache}"]


def test_a_cached_file_that_was_changed_is_downloaded_again(
    site: Site, published: dict[str, bytes], own_cache: Path, lines: list[str]
) -> None:
    cmapss.load("FD001", url=site.url, announce=lines.append)
    (own_cache / "RUL_FD001.txt").write_bytes(b"1 \n")

    cmapss.load("FD001", url=site.url, announce=lines.append)

    assert site.requests == 2
    assert (own_cache / "RUL_FD001.txt").read_bytes() == published["RUL_FD001.txt"]


@pytest.mark.usefixtures("published")
def test_a_subset_without_known_sums_is_taken_and_noted(
    site: Site, tmp_path: Path, lines: list[str]
) -> None:
    synthetic.write(tmp_path / "third", "FD003", engines=2)
    names = cmapss.file_names("FD003")
    site.content = as_nasa_packs({name: (tmp_path / "third" / name).read_bytes() for name in names})

    read = cmapss.load("FD003", url=site.url, announce=lines.append)

    assert read.source == "nasa"
    assert lines[-1] == f"no SHA-256 is known for {', '.join(names)}: taken as downloaded"


BAD_DOWNLOADS: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "no zip": (lambda _: b"<html>moved</html>", "is not a sound zip"),
    "cut off": (lambda files: as_nasa_packs(files)[:-200], "is not a sound zip"),
    "damaged": (
        lambda files: as_nasa_packs(files)[:2000].ljust(len(as_nasa_packs(files)), b"\0"),
        "is not a sound zip",
    ),
    "inner one damaged": (
        lambda files: zipped({"CMAPSSData.zip": zipped(files)[:-500]}),
        "is not a sound zip",
    ),
    "no inner zip": (lambda files: zipped(files), "has no CMAPSSData.zip in it"),
    "no such member": (
        lambda files: as_nasa_packs({"train_FD001.txt": files["train_FD001.txt"]}),
        "test_FD001.txt is not in",
    ),
    "another file": (
        lambda files: as_nasa_packs({**files, "RUL_FD001.txt": b"1 \n2 \n3 \n4 \n"}),
        "RUL_FD001.txt in the download is not NASA's: its SHA-256 is ",
    ),
    "bomb": (
        lambda files: as_nasa_packs({**files, "RUL_FD001.txt": b"0" * (17 * 2**20)}),
        "RUL_FD001.txt in the download is over 16777216 bytes",
    ),
}


@pytest.mark.parametrize(("pack", "message"), BAD_DOWNLOADS.values(), ids=BAD_DOWNLOADS)
def test_a_bad_download_is_said_and_the_generator_used(
    site: Site,
    published: dict[str, bytes],
    own_cache: Path,
    lines: list[str],
    pack: Callable[[dict[str, bytes]], bytes],
    message: str,
) -> None:
    site.content = pack(published)

    read = cmapss.load("FD001", engines=2, url=site.url, announce=lines.append)

    assert read.source == "synthetic"
    assert lines[-1].startswith("SYNTHETIC DATA, not NASA's, is used for FD001 (NASA's files")
    assert message in lines[-1]
    assert not own_cache.exists()


def test_names_in_the_archive_never_become_paths(
    site: Site, published: dict[str, bytes], own_cache: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    outside = {f"../../../../{name}": content for name, content in published.items()}
    site.content = as_nasa_packs({**outside, "/tmp/rul-was-here.txt": b"", "../up.txt": b""})

    assert cmapss.load("FD001", url=site.url, announce=lambda _: None).source == "nasa"

    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert made == {own_cache / name for name in published}
    assert not Path("/tmp/rul-was-here.txt").exists()


def test_a_download_that_is_too_large_is_broken_off(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.content = b"0" * 3_000_000
    monkeypatch.setattr(nasa, "MOST_ZIP_BYTES", 2_000_000)

    with pytest.raises(DataError, match="is larger than 2000000 bytes"):
        nasa.download(site.url)


# --- Normalization ---


def engine(unit: int, sensors: np.ndarray, setting: float = 0.0) -> Engine:
    """Sensors of shape (cycles,) stand for all 21."""
    settings = np.tile([setting, 0.0, 100.0], (len(sensors), 1))
    return Engine(unit, settings, np.repeat(sensors[:, None], 21, axis=1).astype(float))


def test_each_condition_has_its_own_mean_and_deviation() -> None:
    low = engine(1, np.array([1.0, 3.0]), setting=0.004)
    high = engine(2, np.array([100.0, 140.0]), setting=20.001)

    statistics = Statistics.fit([high, low])

    assert statistics.centers[:, 0].tolist() == [0.004, 20.001]
    assert statistics.mean[:, 0].tolist() == [2.0, 120.0]
    assert statistics.std[:, 0].tolist() == [1.0, 20.0]
    assert statistics.normalize(high)[:, 0].tolist() == [-1.0, 1.0]
    assert statistics.normalize(engine(3, np.array([4.0]), setting=0.1))[0, 0] == 2.0


def test_a_sensor_that_never_moves_becomes_zero_and_outliers_are_clipped() -> None:
    still = Statistics.fit([engine(1, np.full(5, 518.67))])
    assert still.normalize(engine(1, np.full(5, 518.67))).abs().max() < 1e-6

    moving = Statistics.fit([engine(1, np.array([-1.0, 1.0]))])
    assert moving.normalize(engine(2, np.array([1e6, -1e6])))[:, 0].tolist() == [10.0, -10.0]


def test_conditions_do_not_depend_on_the_scatter_of_the_settings(folder: Path) -> None:
    settings = np.concatenate([synthetic.CONDITIONS] * 50)
    noise = np.random.default_rng(0).normal(size=settings.shape) * synthetic.SETTING_NOISE * 3

    centers = cmapss.find_conditions(settings + noise)

    assert np.abs(centers - synthetic.CONDITIONS).max() < 0.01
    chosen = cmapss.nearest_condition(settings + noise, centers)
    assert chosen.tolist() == list(range(6)) * 50


def test_settings_without_conditions_are_refused() -> None:
    with pytest.raises(DataError, match="more than 16 operating conditions"):
        cmapss.find_conditions(np.arange(300.0).reshape(-1, 3) * 10)


def test_whole_engines_are_held_out_and_the_seed_says_which() -> None:
    engines = [engine(unit, np.arange(3.0)) for unit in range(1, 11)]

    train, held_out = cmapss.split(engines, 0.2, seed=1)

    assert (len(train), len(held_out)) == (8, 2)
    assert {e.unit for e in train} | {e.unit for e in held_out} == set(range(1, 11))
    again = cmapss.split(engines, 0.2, seed=1)
    assert [e.unit for e in again[1]] == [e.unit for e in held_out]
    others = {tuple(e.unit for e in cmapss.split(engines, 0.2, seed=s)[1]) for s in range(9)}
    assert len(others) > 1
    assert len(cmapss.split(engines, 0.0, seed=1)[1]) == 1  # there must be something to validate
    with pytest.raises(DataError, match="1 engine cannot be split"):
        cmapss.split(engines[:1], 0.2, seed=1)


# --- Windows ---


def test_every_window_has_the_target_and_state_of_its_last_cycle() -> None:
    first, second = engine(1, np.arange(200.0)), engine(2, np.arange(40.0))
    identity = Statistics(np.zeros((1, 3)), np.zeros((1, 21)), np.full((1, 21), 100.0))

    windows = Windows([first, second], identity, window=30, cap=125.0)

    assert len(windows) == (200 - 29) + (40 - 29)
    sensors, target, state = windows[0]
    assert (sensors.shape, sensors.dtype) == ((30, 21), torch.float32)
    assert sensors[:, 0].tolist() == pytest.approx([i / 100 for i in range(30)])
    assert (float(target), int(state)) == (125.0, cmapss.HEALTHY)  # 170 cycles left, capped
    by_target = {170: windows[46], 124: windows[46], 31: windows[139], 30: windows[140]}
    assert [(float(w[1]), int(w[2])) for t, w in by_target.items() if t < 170] == [
        (124.0, cmapss.DEGRADING),
        (31.0, cmapss.DEGRADING),
        (30.0, cmapss.CRITICAL),
    ]
    assert (float(windows[170][1]), int(windows[170][2])) == (0.0, cmapss.CRITICAL)
    assert windows[171][0][:, 0].tolist() == pytest.approx([i / 100 for i in range(30)])
    assert float(windows[181][1]) == 0.0


def test_an_engine_shorter_than_the_window_is_padded_with_its_first_row() -> None:
    short = engine(1, np.array([5.0, 6.0, 7.0]))
    identity = Statistics(np.zeros((1, 3)), np.zeros((1, 21)), np.ones((1, 21)))

    last = cmapss.last_windows([short, engine(2, np.arange(9.0))], identity, window=5)
    windows = Windows([short], identity, window=5, cap=125.0)

    assert last.shape == (2, 5, 21)
    assert last[:, :, 0].tolist() == [[5, 5, 5, 6, 7], [4, 5, 6, 7, 8]]
    assert len(windows) == 1
    assert windows[0][0][:, 0].tolist() == [5, 5, 5, 6, 7]


def test_noise_is_drawn_anew_from_the_global_generator_and_never_changes_the_data() -> None:
    identity = Statistics(np.zeros((1, 3)), np.zeros((1, 21)), np.ones((1, 21)))
    windows = Windows([engine(1, np.ones(8))], identity, window=4, cap=125.0, noise=0.1)

    torch.manual_seed(3)
    first, second = windows[0][0], windows[0][0]
    torch.manual_seed(3)

    assert not torch.equal(first, second)
    assert torch.equal(windows[0][0], first)
    assert torch.equal(windows.rows, torch.ones(8, 21))


# --- NASA's files ---


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("subset", "trains", "tests", "conditions", "above_cap", "short"),
    [("FD001", 100, 100, 1, 11, 0), ("FD002", 260, 259, 6, 57, 6)],
)
def test_nasas_files_are_read_whole(
    real_folder: Path,
    subset: str,
    trains: int,
    tests: int,
    conditions: int,
    above_cap: int,
    short: int,
) -> None:
    read = cmapss.load(subset, str(real_folder))

    assert (len(read.train), len(read.test), len(read.truth)) == (trains, tests, tests)
    assert len(Statistics.fit(read.train).centers) == conditions
    assert int((read.truth > 125).sum()) == above_cap
    assert sum(len(engine.sensors) < 30 for engine in read.test) == short
    last = cmapss.last_windows(read.test, Statistics.fit(read.train), 30)
    assert last.shape == (tests, 30, 21)
    assert bool(torch.isfinite(last).all())


@pytest.mark.real_data
def test_the_known_sums_are_those_of_nasas_files(real_folder: Path) -> None:
    for name, known in nasa.KNOWN_SHA256.items():
        assert hashlib.sha256((real_folder / name).read_bytes()).hexdigest() == known
