"""Options of `recurrent-depth study`. Imports no torch, so that --help is fast."""

from dataclasses import dataclass, field
from typing import Literal

from recurrent_depth.checks import check_at_least, check_each_at_least, check_not_empty, one_section
from recurrent_depth.model.config import MAX_NUM_STEPS


def _check_iterations(name: str, values: list[int]) -> None:
    check_each_at_least(name, values, 1)
    if max(values) > MAX_NUM_STEPS:
        raise ValueError(f"{name} is {values}; every entry must be at most {MAX_NUM_STEPS}")


@dataclass(frozen=True, kw_only=True)
class DepthsStudy:
    """Accuracy over iterations across models that were trained at different mean depths.

    Args:
        results: results.csv of every model, from `recurrent-depth eval`.
        trained: mean depth that each model was trained at, in the order of `results`.
        task: task of the curves; empty: the only one.
        mode: mode of the curves.
    """

    results: list[str] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    task: str = ""
    mode: str = "parallel"

    def __post_init__(self) -> None:
        if len(self.results) < 2 or len(self.results) != len(self.trained):
            raise ValueError(
                f"depths.results has {len(self.results)} files and depths.trained {len(self.trained)} depths; give at "
                "least two files, and the depth of each"
            )
        check_each_at_least("depths.trained", self.trained, 1)


@dataclass(frozen=True, kw_only=True)
class FewshotStudy:
    """Accuracy by number of examples in the prompt and by iterations.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        tasks: names of lm-eval tasks.
        shots: numbers of examples.
        num_steps: core iterations to evaluate at.
        limit: documents per task; null: all.
        include_path: folder with further lm-eval tasks.
    """

    model: str
    tasks: list[str]
    shots: list[int] = field(default_factory=lambda: [0, 5, 25])
    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32])
    limit: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("fewshot.tasks is empty; give at least one task, for example arc_challenge")
        check_each_at_least("fewshot.shots", self.shots, 0)
        _check_iterations("fewshot.num_steps", self.num_steps)
        check_at_least("fewshot.limit", self.limit, 1)


@dataclass(frozen=True, kw_only=True)
class CategoriesStudy:
    """Mean iteration at which exit rules stop tokens, by category.

    With a generated task the categories are its difficulties, and the study measures too whether tokens that need more
    iterations are stopped later: the rank correlation within one length.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        texts: JSON lines with the fields `text` and `category`; or give `task`.
        task: a generated task, for example shell_game; or give `texts`.
        rows: rows of the generated task, or most texts per category.
        length: instructions per row of the generated task.
        exits: exit rules; NAME=THRESHOLD changes the threshold, for example kl=0.001.
        num_steps: iterations; a token that no rule stops counts with this number.
    """

    model: str
    texts: str | None = None
    task: str | None = None
    rows: int = 128
    length: int = 16
    exits: list[str] = field(default_factory=lambda: ["state-change", "kl", "entropy", "argmax"])
    num_steps: int = 32

    def __post_init__(self) -> None:
        if (self.texts is None) == (self.task is None):
            raise ValueError("categories.texts and categories.task: give exactly one of them")
        for name in ("rows", "length"):
            check_at_least(f"categories.{name}", getattr(self, name), 2)
        if not self.exits:
            raise ValueError("categories.exits is empty; give at least one rule, for example kl")
        _check_iterations("categories.num_steps", [self.num_steps])


@dataclass(frozen=True, kw_only=True)
class LossStudy:
    """Loss of the next token by iterations and by position, the saturating law, and the valid range of iterations.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        text_file: text files.
        num_steps: core iterations.
        window: tokens per pass; null: the model's block size.
        max_tokens: most tokens.
        tolerance: the valid range holds the iterations whose loss is at most this above the best, in nats.
        store: write the valid range into the model's folder; `generate`, `eval` and `analyze` warn beyond it.
    """

    model: str
    text_file: list[str]
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    window: int | None = None
    max_tokens: int = 8192
    tolerance: float = 0.01
    store: bool = False

    def __post_init__(self) -> None:
        if not self.text_file:
            raise ValueError("loss.text_file is empty; give at least one text file")
        _check_iterations("loss.num_steps", self.num_steps)
        check_at_least("loss.window", self.window, 2)
        check_at_least("loss.max_tokens", self.max_tokens, 2)
        check_at_least("loss.tolerance", self.tolerance, 0)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Study what iterations buy; write tables (CSV, Markdown) and figures (PNG, SVG). Give one section.

    Args:
        out: new folder.
        depths: accuracy over iterations across models that were trained at different mean depths.
        fewshot: accuracy by number of examples in the prompt and by iterations.
        categories: mean iteration at which exit rules stop tokens, by category.
        loss: loss by iterations and position, the saturating law, and the valid range of iterations.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
    """

    out: str
    depths: DepthsStudy | None = None
    fewshot: FewshotStudy | None = None
    categories: CategoriesStudy | None = None
    loss: LossStudy | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_not_empty("out", self.out, "--out study")
        self.section()

    def section(self) -> str:
        """Return the name of the section that is given."""
        return one_section(_Sections(self.depths, self.fewshot, self.categories, self.loss))[0]


@dataclass(frozen=True)
class _Sections:
    depths: DepthsStudy | None
    fewshot: FewshotStudy | None
    categories: CategoriesStudy | None
    loss: LossStudy | None
