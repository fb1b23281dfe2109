import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from recurrent_depth.files import (
    FolderInUseError,
    atomic_file,
    atomic_folder,
    check_new_folder,
    file_hash,
    folder_lock,
    output_folder,
    write_json,
    write_text,
)


def test_atomic_file_keeps_the_old_content_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_text_and_json_replace_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    write_text(tmp_path / "a", "ü")
    write_json(tmp_path / "b", {"a": 1})
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ü"
    assert (tmp_path / "b").read_text().split() == ["{", '"a":', "1", "}"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_full_disk_error_names_the_target(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device while writing .*out; free some space"):  # noqa: SIM117
        with atomic_folder(tmp_path / "new" / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_atomic_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), atomic_folder(out) as folder:
        (folder / "x").write_text(f"{1 / 0}")
    assert not (tmp_path / "a").exists()
    with atomic_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert os.listdir(out) == ["x"]
    assert os.listdir(out.parent) == ["b"]


@pytest.mark.parametrize("kind", ["full", "file", "empty name"])
def test_new_folder_is_refused_where_something_would_be_lost(tmp_path: Path, kind: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, FileExistsError), match="out: "):
        check_new_folder("" if kind == "empty name" else tmp_path / kind)


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _hold(folder: str, held: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    with folder_lock(folder):
        held.set()
        end.wait(30)


def test_folder_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), held, end))
    process.start()
    assert held.wait(30)
    with pytest.raises(FolderInUseError, match=f"in use by process {process.pid} on"), folder_lock(tmp_path):
        pass
    process.kill()
    process.join()
    with folder_lock(tmp_path):  # the lock of a killed process is free
        pass


def test_folder_lock_warns_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), folder_lock(tmp_path):
        pass


def _write(out: str, held: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    with atomic_folder(out) as folder:
        (folder / "half").write_text("")
        held.set()
        end.wait(30)


def test_atomic_folder_refuses_a_second_writer_and_clears_up_after_a_killed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_write, args=(str(out), held, end))
    process.start()
    assert held.wait(30)
    with pytest.raises(FolderInUseError, match=rf"/out is in use by process {process.pid} on"), atomic_folder(out):
        pass
    process.kill()
    process.join()
    with atomic_folder(out) as folder:
        (folder / "whole").write_text("")
    assert [*os.listdir(tmp_path), *os.listdir(out)] == ["out", "whole"]


def test_output_folder_leaves_nothing_behind_a_refused_command(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="refused"), output_folder(out):
        raise ValueError("refused")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), output_folder(out) as folder:
        (folder / "x").write_text(str((folder / "y").write_text("") / 0))
    assert (out / "y").is_file()


def test_output_folder_is_locked(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"), pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):  # noqa: SIM117
        with output_folder(tmp_path / "out"):
            pass
