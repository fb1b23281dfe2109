"""Decide without a network whether a name is a local folder or a repository on the Hugging Face hub.

A wrong path must not be looked up on the hub: without a connection that takes a minute of retries.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Literal

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_folder_or_hub_name(name: str, option: str = "model", kind: Literal["model", "dataset"] = "model") -> None:
    """Raise unless `name` is a folder, is in the cache of the hub, or may be looked up there as ORG/NAME.

    `runs/frist` is not looked up where a folder `runs` exists, and nothing is if HF_HUB_OFFLINE is set.

    Args:
        name: the value that the user gave.
        option: the option it was given for.
        kind: kind of repository.

    Raises:
        FileNotFoundError: naming the option, the folder that does not exist, and a similar one if there is one.
    """
    path = Path(name)
    if (name and path.is_dir()) or in_hub_cache(name, kind):
        return
    if path.is_file():
        raise FileNotFoundError(f"{option} is {name!r}, a file; give the folder that holds it")
    missing = f"{option}: no such folder {name!r}"
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{missing}{_similar(path)}; a {kind} on the Hugging Face hub is written ORG/NAME")
    if path.parent.is_dir():
        raise FileNotFoundError(f"{missing}{_similar(path)}; correct the path")
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        raise FileNotFoundError(
            f"{missing}, and HF_HUB_OFFLINE forbids access to the Hugging Face hub; correct the path, or unset it"
        )


def in_hub_cache(name: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Return whether a repository has been downloaded from the hub before."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return bool(name) and (cache / f"{kind}s--{name.replace('/', '--')}").is_dir()


def _similar(path: Path) -> str:
    """Return `; did you mean X?` if a folder beside the missing one has a similar name."""
    beside = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
