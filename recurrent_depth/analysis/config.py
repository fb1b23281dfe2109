"""Options of `recurrent-depth analyze`. Imports no torch, so that --help is fast."""

from dataclasses import dataclass, field
from typing import Literal

from recurrent_depth.checks import check_at_least, check_each_at_least, check_not_empty, check_num_steps
from recurrent_depth.model.config import Kernels


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Record what a model computes at every iteration of every token; write one HTML page, figures and arrays.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        out: new folder for index.html, figures/ (PNG, SVG, CSV) and the arrays.
        text: text to analyse, taken literally; give the option once for each text.
        text_file: text files to analyse.
        num_steps: iterations that are recorded.
        converged_steps: iterations of the converged state s*; at least num_steps, and at least 16.
        window: tokens per pass; longer texts are cut, and every window starts anew; null: the model's block size.
        max_tokens: most tokens that are analysed; what comes after them is left out, with a message.
        top: most probable tokens recorded per token and iteration.
        exits: exit rules whose iterations are recorded; NAME=THRESHOLD changes the threshold, for example kl=0.001.
        components: principal components of the states that are recorded.
        tokens: numbers of the tokens, counted from 0 over all texts, whose states are stored in full.
        state_seeds: number of random initial states for path independence; 0 leaves it out.
        jacobian: iterations (at most converged_steps) at which the Jacobian of an iteration is measured.
        jacobian_tokens: number of tokens whose spectral radius is measured.
        attention: iterations (at most num_steps) whose attention maps are stored; only with at most 1024 tokens per
            window.
        results: results.csv files of `recurrent-depth eval`, shown as curves and tables on the page.
        title: title of the page; null: the name of the model.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU. bfloat16 cannot show relative
            changes below about 0.004.
        kernels: implementation of the element-wise operations: auto (triton on a GPU), triton, torch.
    """

    model: str
    out: str
    text: list[str] = field(default_factory=list, metadata={"literal": True})
    text_file: list[str] = field(default_factory=list)
    num_steps: int = 64
    converged_steps: int = 128
    window: int | None = None
    max_tokens: int = 8192
    top: int = 5
    exits: list[str] = field(default_factory=lambda: ["state-change", "kl", "entropy", "argmax"])
    components: int = 3
    tokens: list[int] = field(default_factory=list)
    state_seeds: int = 2
    jacobian: list[int] = field(default_factory=list)
    jacobian_tokens: int = 8
    attention: list[int] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    title: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        check_not_empty("model", self.model, "--model runs/first")
        check_not_empty("out", self.out, "--out analysis")
        if not self.text and not self.text_file:
            raise ValueError("nothing to analyse: give --text TEXT or --text-file FILE")
        check_num_steps("num_steps", self.num_steps)
        check_num_steps("converged_steps", self.converged_steps)
        check_at_least("converged_steps", self.converged_steps, max(self.num_steps, 16))
        check_at_least("window", self.window, 2)
        for name in ("max_tokens", "top", "jacobian_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("components", self.components, 2)
        check_at_least("state_seeds", self.state_seeds, 0)
        check_each_at_least("tokens", self.tokens, 0, empty=True)
        for name, most in (("jacobian", self.converged_steps), ("attention", self.num_steps)):
            values = getattr(self, name)
            check_each_at_least(name, values, 1, empty=True)
            if values and max(values) > most:
                raise ValueError(f"{name} is {values}; every entry must be at most {most} iterations")
