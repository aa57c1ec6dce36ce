"""A file or folder is there as a whole, or not at all, whenever the process dies; JSON that a stranger wrote."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_lrqat import files
from peft_lrqat.files import bytes_in_words, new_folder, read_json, write_atomically

# Python 3.12 and later say that threads, of which torch has some, and fork do not go together; the children only write
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

_OPERATIONS = ("os.", "open", "shutil.", "ctypes.")


@pytest.mark.parametrize(("size", "beside", "words"), [
    (153_600, 76_800, "153.6 kB"), (76_800, 153_600, "76.8 kB"), (538_000_000, 0, "538.0 MB"), (999, 0, "999 bytes"),
    (60_000, 2_000_000, "0.1 MB"), (999, 1000, "1.0 kB"),
])  # fmt: skip
def test_sizes_in_one_sentence_have_one_unit(size: int, beside: int, words: str):
    assert bytes_in_words(size, beside) == words


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "new \udc00")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def fill(folder: Path, version: str) -> None:
    for name in ("one", "two"):
        (folder / name).write_text(version)


def replace(out: Path, version: str = "new", overwrite: bool = True) -> None:
    with new_folder(out, overwrite) as folder:
        fill(folder, version)


def whole(out: Path) -> str:
    """The version that is in a folder; what is mixed or in part fails."""
    versions = {(out / name).read_text() for name in ("one", "two")}
    assert len(versions) == 1
    return versions.pop()


def interrupted(work: Callable[[], None], before: int, how: Callable[[], None]) -> bool:
    """Run `work` in a process of its own, in which `how` happens before the file operation of that number.

    Returns:
        Whether it happened: there were as many.
    """
    child = os.fork()
    if child == 0:
        count = -1

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event.startswith(_OPERATIONS):
                count += 1
                if count == before:
                    how()

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            code = 0 if count < before else 3
        except OSError:
            code = 3
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 3, 9)
    return code != 0


def die() -> None:
    os._exit(9)  # nothing is cleaned up, as after SIGKILL


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    ("exchange", "how", "old"),
    [(True, die, True), (True, fail, True), (False, die, True), (False, fail, True), (True, die, False)],
    ids=["killed", "failed", "killed, two steps", "failed, two steps", "killed, nothing there"],
)
def test_whatever_ends_it_one_version_is_there_as_a_whole(exchange, how, old, tmp_path: Path, monkeypatch):
    if not exchange:  # as on NFS
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    seen, number = set(), 0
    while True:
        base = tmp_path / str(number)
        out = base / "out"
        if old:
            out.mkdir(parents=True)
            fill(out, "old")
        happened = interrupted(lambda out=out: replace(out), number, how)
        seen.add(whole(out) if out.exists() else "nothing")
        if old:  # what was moved out of the way comes back
            with pytest.raises(FileExistsError, match="not empty"):
                replace(out, "newer", overwrite=False)
            assert whole(out) in ("old", "new")
        replace(out, "newer")
        assert whole(out) == "newer"
        assert [path.name for path in base.iterdir()] == ["out"]
        if not happened:
            break
        number += 1
    assert number > 10
    between = not old or (not exchange and how is die)
    assert seen == {"new", *(["old"] if old else []), *(["nothing"] if between else [])}


def test_only_one_writes(tmp_path: Path):
    out = tmp_path / "out"
    with new_folder(out, True) as folder:
        with pytest.raises(BlockingIOError, match="Another export is writing"):
            replace(out)
        fill(folder, "first")
        child = os.fork()
        if child == 0:
            try:
                replace(out, "second")
            except BlockingIOError:
                os._exit(7)
            finally:
                os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert whole(out) == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_locks_a_leftover_is_asked_about(tmp_path: Path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    replace(tmp_path / "out")
    with new_folder(tmp_path / "out", True), pytest.raises(BlockingIOError, match=r"or was killed.*delete"):
        replace(tmp_path / "out")


def test_what_appears_in_the_meantime_is_kept(tmp_path: Path):
    theirs = tmp_path / "out"

    def write() -> None:
        with new_folder(theirs, False):
            theirs.mkdir()
            fill(theirs, "theirs")

    with pytest.raises(FileExistsError, match="meantime"):
        write()
    assert whole(tmp_path / "out") == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_exchange_puts_back_what_was_there(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    replace(tmp_path / "out", "old")
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if Path(a).name != "new" or Path(b).exists() else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace(tmp_path / "out", "new")
    assert whole(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "mount").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mount")
    for out, said in (
        ("file", "is a file"),
        ("file/out", "cannot be written in"),
        ("mount", "mount point"),
        (".", "working directory"),
        ("..", "working directory"),
        ("loop", "loop|levels of symbolic links"),
        ("n" * 250, "cannot be written in .*long"),
    ):
        with pytest.raises(OSError, match=said):
            replace(Path(out))
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="not writable"):
        replace(Path("there"))

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(OSError, match=r"cannot be written in \(Read-only"):
            replace(Path("out"))


def test_parents_are_made_and_go_again(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "out", False):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    replace(tmp_path / "a" / "b" / "out")
    assert whole(tmp_path / "a" / "b" / "out") == "new"


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch):
    replace(tmp_path / "out", "old")

    def rmtree(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    with pytest.warns(UserWarning, match=r"could not be removed .*Delete it"):
        replace(tmp_path / "out")
    assert whole(tmp_path / "out") == "new"
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(tmp_path / "out", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("text", "said"), [
    (b"[" * 100_000, "damaged"),
    (b'{"a": ' * 100_000, "damaged"),
    (b"\xff\xfe", "damaged"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
    (b"[1]", "holds a list"),
    (b"", "damaged"),
    (b" " * 2000, "has 2000 bytes; 1000"),
    (b'{"a": ' + b"9" * 5000 + b"}", "damaged|bytes"),
], ids=range(8))  # fmt: skip
def test_json_of_a_stranger(text: bytes, said: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=said) as error:
        read_json(path, 1000 if text[:1] == b" " else 1 << 20)
    assert "config.json" in str(error.value)


def test_what_is_no_file_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        with pytest.raises(ValueError, match=f"{name}' is no regular file"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")
