"""What a stage of curation is: options, a function from rows to rows, and a name in recipes."""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from recurrent_depth.building import OptionError, build
from recurrent_depth.data.layout import DataError
from recurrent_depth.extras import require
from recurrent_depth.files import file_hash
from recurrent_depth.reasoning.config import SourceConfig
from recurrent_depth.reasoning.pool import Drop, Example, source_files

BUILT_IN = ("duplicates", "quality", "teacher", "grading", "difficulty", "lengths", "domains", "selection")


@dataclass(frozen=True)
class Context:
    """What a stage may use besides the rows.

    Attributes:
        stage: its name in the recipe.
        root: folder of relative data paths.
        cache: folder for replies of models, which are kept when a run is killed.
        seed: of this stage.
        facts: what earlier stages found, by their names.
    """

    stage: str
    root: Path
    cache: Path
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def generator(self) -> np.random.Generator:
        """Return the stage's random numbers."""
        return np.random.default_rng(self.seed)

    def drop(self, example: Example, reason: str, detail: str = "") -> Drop:
        """Return the record of a dropped row."""
        return Drop(example, self.stage, reason, detail)


@dataclass
class Outcome:
    """The rows after a stage.

    Attributes:
        examples: rows that stay, in order.
        drops: rows that are dropped.
        facts: plain JSON for later stages and the report.
    """

    examples: list[Example]
    drops: list[Drop] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage(ABC):
    """Base of all stages: a frozen dataclass of options with these two methods."""

    kind: ClassVar[str] = ""

    def inputs(self, context: Context) -> list[Any]:
        """Return plain JSON that changes when what the stage reads besides the rows changes (files, models).

        Called for every stage before the first one runs, so that a missing file or package is an error at the start.
        """
        return []

    @abstractmethod
    def apply(self, examples: list[Example], context: Context) -> Outcome:
        """Return the rows that stay and those that are dropped; every row must be in one of both."""


STAGES: dict[str, type[Stage]] = {}
S = TypeVar("S", bound=type[Stage])


def stage(kind: str) -> Callable[[S], S]:
    """Return a class decorator that makes a `Stage` known to recipes as `kind`."""

    def register(cls: S) -> S:
        cls.kind = kind
        STAGES[kind] = cls
        return cls

    return register


def build_stage(description: Mapping[str, Any]) -> Stage:
    """Return a stage from `{stage: KIND, option: value, ...}`; errors name the stage and the option."""
    for name in BUILT_IN:
        importlib.import_module(f"recurrent_depth.reasoning.curation.{name}")
    options = {name: value for name, value in description.items() if name not in ("stage", "name")}
    kind = description.get("stage")
    if kind not in STAGES:
        raise OptionError(f"stages: {kind!r} is not a kind of stage; known are {', '.join(sorted(STAGES))}")
    return build(STAGES[kind], options, f"stages.{description.get('name', kind)}")


def hash_examples(examples: Sequence[Example]) -> str:
    """Return a hash of rows and their order."""
    content = hashlib.sha256()
    for example in examples:
        content.update(json.dumps(asdict(example), sort_keys=True).encode())
    return content.hexdigest()


def source_inputs(sources: Sequence[SourceConfig], root: Path) -> list[Any]:
    """Return sources with the hashes of their files."""
    inputs = []
    for source in sources:
        files = source_files(source, root)
        if not files:
            require("datasets", "recurrent-depth[curate]", f"the data set {source.path}")
        inputs.append([asdict(source), [file_hash(file) for file in files]])
    return inputs


def needed_version(module: str, package: str) -> str:
    """Return the version of a package that a stage cannot do without."""
    require(module, "recurrent-depth[curate]", "this stage of the curation")
    return version(package)


def existing(path: str, root: Path) -> Path:
    """Return a file below `root`, or raise."""
    file = root / path
    if not file.is_file():
        raise DataError(f"{file} does not exist; fix the path, or --root, the folder of relative paths")
    return file
