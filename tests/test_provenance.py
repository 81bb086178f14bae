from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint import provenance
from runner.checkpoint.code import changes
from runner.checkpoint.provenance import (
    collect,
    git_state,
    installed_packages,
    keep_changes,
    mask_command,
    mask_secrets,
)
from runner.store import DirectoryStore

UNKNOWN = {"commit": None, "branch": None, "dirty": None}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    return subprocess.check_output(["git", *identity, *arguments], cwd=folder, text=True).strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "trunk")
    (folder / "train.py").write_text("print()\n")
    (folder / ".gitignore").write_text("runs/\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


# ---------------------------------------------------------------- git


def digest_of(folder: Path) -> str:
    found = changes(folder)
    assert found is not None
    return found.digest


def test_changes_have_one_digest_that_follows_all_of_them(repository: Path) -> None:
    seen = {digest_of(repository)}
    change(repository)
    seen.add(digest_of(repository))
    (repository / "new.py").write_text("1")
    seen.add(digest_of(repository))
    (repository / "new.py").write_text("2")
    seen.add(digest_of(repository / "."))
    (repository / "new.py").rename(repository / "newer.py")
    seen.add(digest_of(repository))

    assert len(seen) == 5


def test_the_same_changes_elsewhere_are_the_same(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    for folder in (repository, copy):
        change(folder)
        (folder / "new.py").write_text("1")

    assert digest_of(repository) == digest_of(copy)


def test_dirty_facts_name_the_changes(repository: Path) -> None:
    change(repository)
    (repository / "new.py").touch()

    git_facts = collect(repository, [])["git"]

    assert git_facts["dirty"] is True
    assert git_facts["diff"] == digest_of(repository)
    assert (git_facts["untracked"], git_facts["untracked_files"]) == (["new.py"], 1)


def test_changes_are_kept_where_that_is_wanted_and_without_secrets(
    repository: Path, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    (repository / "train.py").write_text('token = "hf_abcdefghijklmnopqrstuvwxyz"\n')

    keep_changes(store, "run", repository)

    (kept,) = store.children("run/diffs")
    assert kept == f"{digest_of(repository)}.patch"
    patch = store.read(f"run/diffs/{kept}", 1 << 20).decode()
    assert '+token = "***"' in patch
    assert "-print()" in patch


def test_a_clean_repository_has_no_changes_to_keep(repository: Path, tmp_path: Path) -> None:
    keep_changes(DirectoryStore(tmp_path / "store"), "run", repository)
    keep_changes(DirectoryStore(tmp_path / "store"), "run", tmp_path)

    assert not (tmp_path / "store").exists()


def test_a_clean_repository_is_its_commit(repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs" / "ignored").touch()
    commit = git(repository, "rev-parse", "HEAD")

    assert git_state(repository) == {"commit": commit, "branch": "trunk", "dirty": False}


def change(folder: Path) -> None:
    (folder / "train.py").write_text("print(1)\n")


def stage(folder: Path) -> None:
    change(folder)
    git(folder, "add", "train.py")


def add_untracked(folder: Path) -> None:
    git(folder, "config", "status.showUntrackedFiles", "no")
    (folder / "new.py").touch()


def delete(folder: Path) -> None:
    (folder / "train.py").unlink()


@pytest.mark.parametrize("alter", [change, stage, add_untracked, delete])
def test_what_the_commit_does_not_have_is_dirty(repository: Path, alter: Any) -> None:
    alter(repository)

    assert git_state(repository)["dirty"] is True


def test_a_folder_of_a_repository_knows_of_all_of_it(repository: Path) -> None:
    (repository / "jobs").mkdir()
    change(repository)

    state = git_state(repository / "jobs")

    assert (state["branch"], state["dirty"]) == ("trunk", True)


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")

    assert git_state(repository)["branch"] is None
    assert git_state(repository)["commit"] == git(repository, "rev-parse", "HEAD")


def test_before_the_first_commit_there_is_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch", "trunk")

    assert git_state(tmp_path) == {"commit": None, "branch": "trunk", "dirty": False}


def test_no_repository_and_no_directory_are_unknown(tmp_path: Path) -> None:
    assert git_state(tmp_path) == UNKNOWN
    assert git_state(tmp_path / "nowhere") == UNKNOWN


def test_a_repository_of_somebody_else_is_unknown(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests use it

    assert git_state(repository) == UNKNOWN


def test_without_git_it_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))

    assert git_state(repository) == UNKNOWN


def test_a_git_that_hangs_is_not_waited_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "bin" / "git"
    hanging.parent.mkdir()
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", str(hanging.parent), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_SECONDS", 0.1)
    started = time.monotonic()

    assert git_state(repository) == UNKNOWN

    assert time.monotonic() - started < 10


def test_a_hook_of_another_repository_does_not_mislead(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet", "--initial-branch", "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))

    assert git_state(repository)["branch"] == "trunk"


def test_the_repository_is_left_as_it_was(repository: Path, tmp_path: Path) -> None:
    (repository / "hook").write_text(f"#!/bin/sh\ntouch {tmp_path}/hook-was-run\n")
    (repository / "hook").chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(repository / "hook"))
    os.utime(repository / "train.py", (1, 1))  # `git status` would refresh the index for this
    index = (repository / ".git" / "index").read_bytes()

    assert git_state(repository)["dirty"] is True

    assert (repository / ".git" / "index").read_bytes() == index
    assert not (tmp_path / "hook-was-run").exists()


# ---------------------------------------------------------------- packages and the rest


def test_packages_are_those_of_importlib_metadata() -> None:
    expected = {
        re.sub(r"[-_.]+", "-", each.name).lower(): each.version
        for each in reversed(list(importlib.metadata.distributions()))
    }

    assert installed_packages() == dict(sorted(expected.items()))
    assert installed_packages()["pytest"] == pytest.__version__


def test_the_first_package_on_the_path_counts_and_odd_folders_are_read(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("Some.Name-1.0+cpu.dist-info", "~ome_name-0.9.dist-info", "empty.dist-info"):
        (first / name).mkdir(parents=True)
    for name in ("some_name-2.0.dist-info", "an-other-3.1.dist-info", "notes.txt"):
        (second / name).mkdir(parents=True)
    (first / "bare.dist-info").mkdir()
    (first / "bare.dist-info" / "METADATA").write_text("Name: bare\nVersion: 6.0\n")
    (second / "develop.egg-info").mkdir()
    (second / "develop.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: Develop\nVersion: 4.0\n\nVersion: of the text\n"
    )
    (second / "old-5.0-py3.11.egg-info").write_text("Name: old\nVersion: 5.0\n")

    found = installed_packages([str(tmp_path / "nowhere"), str(first), str(second)])

    assert found == {
        "some-name": "1.0+cpu",
        "an-other": "3.1",
        "develop": "4.0",
        "old": "5.0",
        "bare": "6.0",
    }


def test_the_facts_are_plain_json_without_the_environment(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "value-of-some-variable")

    facts = collect(repository, ["python", "train.py", "--api-key", "abc"])

    text = json.dumps(facts)
    assert json.loads(text) == facts
    assert "value-of-some-variable" not in text
    assert facts["command"] == ["python", "train.py", "--api-key", "***"]
    assert facts["git"]["branch"] == "trunk"
    assert facts["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["host"] == os.uname().nodename
    assert 1 <= facts["cpu"]["usable"] <= facts["cpu"]["count"]


def test_collecting_is_quick(repository: Path) -> None:
    def spent() -> float:
        """Processor time, of children too: a busy machine changes it least."""
        return sum(os.times()[:4])

    def seconds() -> float:
        before = spent()
        collect(repository, [])
        return spent() - before

    assert min(seconds() for _ in range(5)) < 0.1


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from runner.checkpoint import provenance; "
        "print({'torch', 'numpy', 'boto3', 'pydantic', 'email'} & set(sys.modules))"
    )

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


# ---------------------------------------------------------------- masking

KEYS = {
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "aws, temporary": "ASIAIOSFODNN7EXAMPLE",
    "github": "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    "github, fine-grained": "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvw",
    "gitlab": "glpat-ABCdef123456ghiJKL78",
    "hugging face": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678",
    "openai": "sk-proj-abcd1234efgh5678ijkl",
    "slack": "xoxb-123456789012-abcdef",
    "google": "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def-123",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIB\nAAKC\n-----END RSA PRIVATE KEY-----",
    "pem, cut off": "-----BEGIN PRIVATE KEY-----\nMIIEpAIB\nAAKC",
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_what_looks_like_a_key_is_masked_wherever_it_stands(key: str) -> None:
    assert mask_secrets({"note": key, "list": [{"a": key}]}) == {
        "note": "***",
        "list": [{"a": "***"}],
    }
    assert mask_command(["run", key]) == ["run", "***"]
    assert key not in mask_command([f"curl -d '{key}' x"])[0]


TELLING_NAMES = [
    *("token", "HF_TOKEN", "hf-token", "accessToken", "tokens", "wandb_api_key", "apiKey"),
    *("API-KEY", "aws_secret_access_key", "access_key", "password", "db_passwd", "pwd"),
    *("passphrase", "credentials", "clientSecret", "private_key", "Authorization"),
]


@pytest.mark.parametrize("name", TELLING_NAMES)
def test_what_stands_under_a_telling_name_is_masked(name: str) -> None:
    assert mask_secrets({name: "abc"}) == {name: "***"}
    assert mask_secrets({"a": {name: ["abc", {"b": "c"}]}}) == {"a": {name: ["***", {"b": "***"}]}}
    assert mask_command([f"--{name}=abc", f"--{name}", "abc", "--lr", "1"]) == [
        *(f"--{name}=***", f"--{name}", "***", "--lr", "1")
    ]
    assert mask_secrets({"command": [f"--{name}", "abc"]}) == {"command": [f"--{name}", "***"]}
    assert mask_command(["-p", f"{name}=abc"]) == ["-p", f"{name}=***"]
    assert mask_command([f'{{"{name}": "a b", "lr": 1}}']) == [f'{{"{name}": "***", "lr": 1}}']
    assert mask_command([f"train --{name} 'a b' --lr 1"]) == [f"train --{name} '***' --lr 1"]


HARMLESS: list[dict[str, Any]] = [
    {"tokenizer": "bert-base", "tokenization": "bpe"},
    {"max_tokens": 512, "tokens_per_batch": "64k", "add_special_tokens": True},
    {"password": "", "use_secret": False, "api_key": None},
    {"lr": 1e-3, "subset": "FD001", "keys": ["a"], "key": "b", "author": "me", "compass": "n"},
    {"url": "s3://bucket/a:b@c", "host": "http://localhost:80/a@b", "mail": "a:b@c.example"},
    {"model": "hf_dataset_name", "package": "sk-learn-extensions-of-mine", "commit": "a" * 40},
    {"text": "the secret of a good token is a long password"},
]


@pytest.mark.parametrize("params", HARMLESS, ids=str)
def test_ordinary_parameters_are_kept(params: dict[str, Any]) -> None:
    assert mask_secrets(params) == params
    strings = {name: value for name, value in params.items() if isinstance(value, str) and value}
    command = [part for name, value in strings.items() for part in (f"--{name}", value)]
    assert mask_command(command) == command


def test_numbers_are_masked_where_they_can_be_passwords() -> None:
    assert mask_secrets({"password": 1234, "pin": 1}) == {"password": "***", "pin": 1}


def test_of_a_url_only_the_user_is_masked() -> None:
    params = {
        "mlflow": "https://me:p%40ss@host:5000/path",
        "db": "postgresql://:pass@word@host/db",
        "signed": "https://host/x?a=1&sig=abc%3D&b=2",
    }

    assert mask_secrets(params) == {
        "mlflow": "https://***@host:5000/path",
        "db": "postgresql://***@host/db",
        "signed": "https://host/x?a=1&sig=***&b=2",
    }


COMMANDS = {
    "HF_TOKEN=abc python train.py": "HF_TOKEN=*** python train.py",
    'export API_KEY="a b"; python t.py': 'export API_KEY="***"; python t.py',
    "curl -H 'Authorization: Bearer a.b c' x": "curl -H 'Authorization: ***' x",
    "curl -H 'X: bearer abc' x": "curl -H 'X: bearer ***' x",
    "train --password hunter2 --max-tokens 512": "train --password *** --max-tokens 512",
    "train --use-token --epochs 3": "train --use-token --epochs 3",
    "API_KEY='' PASSWORD=\"\" train": "API_KEY='' PASSWORD=\"\" train",
    "python my-token-file.py train": "python my-token-file.py train",
}


@pytest.mark.parametrize(("text", "masked"), COMMANDS.items(), ids=COMMANDS)
def test_the_command_of_a_shell_is_looked_into(text: str, masked: str) -> None:
    assert mask_command(["bash", "-c", text]) == ["bash", "-c", masked]


def test_a_flag_takes_no_value() -> None:
    command = ["--use-token", "--epochs", "3", "--max-tokens", "512"]

    assert mask_command(command) == command


def test_a_long_argument_takes_no_long_time() -> None:
    arguments = ["a" * 300_000, "a-" * 150_000, "token" * 20_000, "://" * 30_000, "sk-" * 10_000]
    started = time.perf_counter()

    mask_command(arguments)

    assert time.perf_counter() - started < 5


names = st.sampled_from([*TELLING_NAMES, "lr", "tokenizer", "url", "max_tokens", ""])
fragments = st.sampled_from(
    [*KEYS.values(), *TELLING_NAMES, *"=: '\"@/-?&\n{}", "://", "--", "a", "1", "***"]
)
texts = st.lists(fragments, max_size=8).map("".join) | st.text(max_size=20)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@given(params=st.dictionaries(names, values, max_size=4), command=st.lists(texts, max_size=5))
def test_masking_leaves_no_key_keeps_the_shape_and_is_done_once(
    params: dict[str, Any], command: list[str]
) -> None:
    before = json.dumps(params)
    masked, arguments = mask_secrets(params), mask_command(command)

    assert json.dumps(params) == before
    assert json.loads(json.dumps(masked)) == masked
    assert shape(masked) == shape(params)
    assert len(arguments) == len(command)
    assert mask_secrets(masked) == masked
    assert mask_command(arguments) == arguments
    assert not [text for text in (*strings_in(masked), *arguments) if "MIIEpAIB" in text]


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else None


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [text for each in inner for text in strings_in(each)]
    return [value] if isinstance(value, str) else []
