"""Files and folders that are either complete or absent: atomic writes, hashes, locks on output folders.

Imports nothing outside the standard library.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"


class FolderInUseError(OSError):
    """Another process is writing to the folder."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    Raises:
        OSError: with the name of the target, if the disk is full. The target is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explain_full_disk(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def atomic_folder(out: str | Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `out`; rename it to `out` when the block ends without an error.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        OSError: with the name of the target, if the disk is full. Nothing is left behind.
    """
    out = Path(out)
    check_new_folder(out)
    created = _first_missing_parent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.mkdir(exist_ok=True)
    with folder_lock(temporary, out):
        try:
            with explain_full_disk(out):
                check_new_folder(out)  # another process may have finished it in the meantime
                _empty(temporary)  # remove what a killed process left
                yield temporary
                if out.exists():
                    out.rmdir()
                (temporary / LOCK_FILE).unlink()
                os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if created is not None:
                _remove_empty_folders(out.parent, down_to=created)
            raise


@contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """Create `out` if it is missing, hold its lock, and yield it. Use it for a folder that grows over a long time.

    If this call created the folder and the block fails before it has written anything, the folder is removed again.

    Raises:
        FolderInUseError: if another process holds the lock.
    """
    out = Path(out)
    _check_folder_name(out)
    created = None if out.exists() else _first_missing_parent(out) or out
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        try:
            yield out
        except BaseException:
            if created is not None and os.listdir(out) == [LOCK_FILE]:
                (out / LOCK_FILE).unlink()
                _remove_empty_folders(out, down_to=created)
            raise


def check_new_folder(out: str | Path) -> None:
    """Raise unless `out` can become a new folder: it must not exist, or be an empty folder."""
    _check_folder_name(out)
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} exists and is not empty; give a new folder or remove it")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Return the SHA-256 of a value as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def folder_lock(folder: str | Path, name: str | Path | None = None) -> Iterator[None]:
    """Hold the lock on an existing output folder, so that no second process writes to it.

    The operating system releases the lock when the process ends, however it ends. A file system without locks
    (Lustre mounted without `flock`) gives a warning instead of a lock.

    Args:
        name: name of the folder in the error; default its path.

    Raises:
        FolderInUseError: if another process holds the lock; the message names that process.
    """
    path = Path(folder) / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise FolderInUseError(_in_use(name or folder, holder)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warning = f"{folder} cannot be locked ({error.strerror}); do not start a second command with this --out"
            warnings.warn(warning, stacklevel=3)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise FolderInUseError(_in_use(name or folder, "a process that has just ended"))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
        file.truncate(0)


def _in_use(folder: str | Path, holder: str) -> str:
    return f"{folder} is in use by {holder}; wait for it to end, or choose another --out"


@contextmanager
def explain_full_disk(target: str | Path) -> Iterator[None]:
    """Add the target and the fix to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename2 is not None:
            raise
        raise OSError(
            error.errno, f"{os.strerror(error.errno)} while writing {target}; free some space and run the command again"
        ) from error


def _check_folder_name(out: str | Path) -> None:
    if str(out) in ("", "."):
        raise ValueError("out: '' is not a folder name; give a new folder, for example --out runs/first")
    if Path(out).exists() and not Path(out).is_dir():
        raise FileExistsError(f"out: {out} is a file; give a new folder")


def _empty(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _first_missing_parent(path: Path) -> Path | None:
    missing = [parent for parent in path.parents if not parent.exists()]
    return missing[-1] if missing else None


def _remove_empty_folders(folder: Path, down_to: Path) -> None:
    """Remove `folder` and its parents down to (and including) `down_to`, as long as they are empty."""
    while True:
        try:
            folder.rmdir()
        except OSError:
            return
        if folder == down_to:
            return
        folder = folder.parent
