"""Writing files and folders so that they are there as a whole, or not at all; a stranger's JSON; sizes in words."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) under a temporary name, then move it into place; a failure leaves what was there."""
    path = Path(path)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def bytes_in_words(size: int, beside: int = 0) -> str:
    """A number of bytes as a sentence has it: "53.8 MB", "76.8 kB", "912 bytes".

    Args:
        beside: another number in the same sentence. The larger one says which unit both have.
    """
    largest = max(size, beside)
    if largest < 1000:
        return f"{size} bytes"
    return f"{size / 1e6:.1f} MB" if largest >= 1e6 else f"{size / 1e3:.1f} kB"


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to write in. When the block ends it becomes `out`, in one step; if the block fails, nothing
    does.

    It is `new` in a folder beside `out`, `.NAME.writing`, whose file `lock` is locked meanwhile. If the process is
    killed, the lock is free, and the next call for the same `out` removes what it finds there. What `out` held is
    exchanged with the new content, so that one of the two is there at any moment. (Where the file system cannot
    exchange folders, as NFS, there are two steps; the next call for the same `out` puts back what was there if the
    process is killed between them.)

    Args:
        out: where it will be; a link stays, and leads to what is written.
        overwrite: whether a folder with content is replaced.

    Raises:
        FileExistsError: there is a file, or a folder with content that is not to be replaced; or it cannot be: a mount
            point, or the working directory or one above it.
        BlockingIOError: another process or thread is writing there.
        ValueError: its path is not UTF-8.
        OSError: its place cannot be written in.

    They are raised before the block begins, unless somebody else changes the place in the meantime.
    """
    try:
        target = out.resolve()
    except RuntimeError as error:  # Python before 3.13; later versions find the loop below
        raise OSError(f"{str(out)!r} cannot be written: {error}.") from error
    check_utf8(target)
    _check_replaceable(target)
    work = target.parent / f".{target.name}.writing"
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(work, target)
    except OSError as error:
        if error.errno is None:  # one of ours
            raise
        where = str(target.parent)
        raise type(error)(f"{where!r} cannot be written in ({error.strerror}). Name another place.") from error
    try:
        _recover(work, target)
        if not overwrite and target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"The folder {str(out)!r} is not empty. Name another, or use `overwrite=True`.")
        folder = work / "new"
        folder.mkdir()
        yield folder
        _put(folder, target, work / "old", overwrite)
    finally:
        try:
            _recover(work, target)
        except OSError as error:
            warnings.warn(f"{str(work)!r} could not be removed ({error}). Delete it.", stacklevel=3)
        with suppress(OSError):  # not empty: something could not be removed, or another process has just come
            os.unlink(work / "lock")
            work.rmdir()
        os.close(lock)
        for parent in missing:
            with suppress(OSError):  # not empty
                parent.rmdir()


def _check_replaceable(target: Path) -> None:
    if os.path.lexists(target) and not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file. Name a folder.")
    if not target.exists():
        return
    if os.path.ismount(target):
        raise FileExistsError(f"{str(target)!r} is a mount point, which cannot be replaced. Name a folder in it.")
    here = Path.cwd()
    if any(os.path.samefile(target, folder) for folder in (here, *here.parents)):
        raise FileExistsError(f"{str(target)!r} is the working directory, or holds it. Name a folder in it.")
    if not os.access(target, os.W_OK):  # which moving it takes
        raise PermissionError(f"{str(target)!r} is not writable. Name another folder.")


def _lock(work: Path, target: Path) -> int:
    """A descriptor of the locked file of `work`, which is made."""
    while True:
        work.mkdir(exist_ok=True)
        path, found = work / "lock", False
        try:
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                lock, found = os.open(path, os.O_RDWR), True
        except FileNotFoundError:  # whoever wrote here has just ended
            continue
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(lock)
                raise BlockingIOError(
                    f"Another export is writing {str(target)!r}. Wait for it, or name another folder."
                ) from None
            if found:  # no locks here: nothing tells a process that works from one that was killed
                os.close(lock)
                raise BlockingIOError(
                    f"Another export is writing {str(target)!r}, or was killed. If none is, delete {str(work)!r}."
                ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # of a file that was removed between opening and locking it


def _recover(work: Path, target: Path) -> None:
    """Remove what is left of a process that was killed or failed; what it had moved aside comes back first."""
    if (work / "old").exists() and not target.exists():
        os.rename(work / "old", target)
    for entry in work.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry)


def _put(folder: Path, target: Path, aside: Path, overwrite: bool) -> None:
    """Move a folder to `target`. What was there is then called `folder`, or `aside`, or was empty."""
    if sys.platform == "win32" and target.exists() and not any(target.iterdir()):  # elsewhere, renaming replaces it
        target.rmdir()
    try:
        os.rename(folder, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise FileExistsError(f"{str(target)!r} was filled by somebody else in the meantime.") from error
    if not _exchange(folder, target):
        os.rename(target, aside)
        os.rename(folder, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system has no such step."""
    name, here = {"linux": ("renameat2", -100), "darwin": ("renameatx_np", -2)}.get(sys.platform, ("", 0))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    swap = 2  # RENAME_EXCHANGE, and macOS' RENAME_SWAP
    if call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def check_utf8(path: Path) -> None:
    """Raise ValueError if a path is not UTF-8: the library `safetensors` opens no files there."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8, and safetensors opens no files there. Rename it.") from error


def regular_file(path: Path) -> Path:
    """Return `path`, if it is a file that can be read to its end.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is a folder, a pipe or a device. (Links are followed: the Hub's cache is made of them.)
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{str(path)!r} is no regular file. Download it again.")
    return path


def read_json(path: Path, largest: int = 1 << 24) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        largest: size of the file in bytes; parsing takes some thirty times as much memory at worst.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, too large, nested too deep, holds no object, or one that has a key twice (programs
            differ in which value they take).
    """
    size = regular_file(path).stat().st_size
    if size > largest:
        raise ValueError(f"{str(path)!r} has {size} bytes; {largest} can be read. Download it again.")
    return json_object(path.read_bytes(), path)


def json_object(text: bytes, path: Path) -> dict[str, Any]:
    """The object in a text of JSON; ValueError as for `read_json`.

    Args:
        path: the file that the text is from, for messages.
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, no object. Download it again.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} stands there twice")
        found[name] = value
    return found
