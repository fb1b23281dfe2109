"""Options that must be refused: the message names the option and the allowed values, and nothing is left behind."""

import math

import pytest

from recurrent_depth.cli import VERBS, main
from recurrent_depth.data.config import DataConfig, PrepareConfig, SourceConfig, TaskDataConfig
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.planning.config import PlanConfig
from recurrent_depth.training.commands import AverageConfig
from recurrent_depth.training.config import (
    HealthConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    SpikeConfig,
)

TRAIN = ["train", "--out", "run", "--data.task.name", "shell_game"]
PACKED = ["train", "--out", "run", "--data.packed.path", "data"]
PREPARE = ["prepare", "--out", "data", "--source", "python-stdlib"]
ROWS = ["prepare-reasoning", "--out", "data", "--tokenizer", "t.json", "--rows", "{path: rows.jsonl}"]
CURATE = ["curate", "--out", "set", "--pool", "{path: rows.jsonl}"]
AVERAGE = ["average", "--model", "run", "--out", "average"]
PLAN = ["plan", "--run", "run.yaml", "--num-gpus", "8"]
DENSE = ["train-dense", "--run", "run.yaml", "--model", "dense", "--out", "out"]
RUN_FILE = "out: run\ndata: {packed: {path: data}}\nbatch_size: 64\noptimizer: {name: adamw}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory with one file of options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    return tmp_path


def refused(arguments, capsys, folder, status=2):
    """Return the error of a command that must fail, after checking that it has no traceback and left nothing behind."""
    before = {path.name for path in folder.iterdir()}
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.split("\n\n")[0].splitlines()) <= 2
    assert {path.name for path in folder.iterdir()} == before
    return captured.err.splitlines()[0].removeprefix("error: ")


NUMBERS = [
    # command, option, refused values, one of these texts must be in the message
    (TRAIN, "steps", ["0", "-1", "1.5", "many", "null", "true", "inf"], "at least 1|whole number"),
    (TRAIN, "batch-size", ["0", "-8", "8.5"], "at least 1|whole number"),
    (TRAIN, "micro-steps", ["0", "3"], "at least 1|multiple of micro_steps"),
    (TRAIN, "log-every", ["0"], "at least 1"),
    (TRAIN, "seed", ["-1", "a"], "at least 0|whole number"),
    (TRAIN, "max-hours", ["nan", ".nan", "inf", "0", "-1", "soon"], "above 0|number"),
    (TRAIN, "slurm-margin-minutes", ["-1", "nan", "inf"], "at least 0|number"),
    (TRAIN, "depth-ramp.start", ["0", "9"], "at least 1|at most model.mean_recurrence, which is 8"),
    (TRAIN, "depth-ramp.steps", ["0"], "at least 1"),
    (TRAIN, "objective.every.reads", ["0", "1"], "at least 2"),
    (TRAIN, "objective.gated.beta", ["-1", "nan", "inf"], "at least 0|number"),
    (TRAIN, "objective.self-distilled.decay-steps", ["-1"], "at least 0"),
    (TRAIN, "objective.labelled.label", ["later"], "backward, forward, accuracy"),
    (TRAIN, "objective.labelled.margin", ["-1", "nan"], "at least 0|number"),
    (TRAIN, "trainable", ["gate", "head"], "give objective.labelled or|all, adapter, gate"),
    (TRAIN, "model.gate.input", ["change"], "state, state_and_change"),
    (TRAIN, "model.gate.bias", ["nan", "inf"], "finite|number"),
    (TRAIN, "model.n-embd", ["0", "63", "-64"], "at least 1|even"),
    (TRAIN, "model.n-heads", ["0", "3"], "at least 1|even"),
    (TRAIN, "model.vocab-size", ["0"], "at least 1"),
    (TRAIN, "model.block-size", ["0"], "at least 1"),
    (TRAIN, "model.mean-recurrence", ["0", "4097", "1000000"], "at least 1|at most 4096 iterations"),
    (TRAIN, "model.mean-backprop-depth", ["0"], "at least 1"),
    (TRAIN, "model.norm-eps", ["0", "nan", "inf"], "above 0|number"),
    (TRAIN, "model.rope-base", ["1", "nan", "inf"], "above 1|number"),
    (TRAIN, "model.state-init", ["ones"], "like-init, zero"),
    (TRAIN, "model.sampling-scheme", ["uniform"], "poisson-lognormal-filling, fixed"),
    (TRAIN, "optimizer.name", ["sgd"], "huginn, adamw, nadamw, muon"),
    (TRAIN, "optimizer.lr", ["0", "-1", "nan", "inf", "fast"], "above 0|number"),
    (TRAIN, "optimizer.betas", ["0.9", "0.9,1", "0.9,nan", "-0.1,0.9", "0.9,0.95,0.99"], "[0, 1)|number|2 entries"),
    (TRAIN, "optimizer.weight-decay", ["-1", "nan", "inf"], "at least 0|number"),
    (TRAIN, "optimizer.eps", ["0", "nan"], "above 0|number"),
    (TRAIN, "optimizer.momentum", ["1", "-0.1", "nan"], "[0, 1)|number"),
    (TRAIN, "optimizer.gradient-clip", ["0", "-1", "nan"], ".inf for no limit|number"),
    (TRAIN, "optimizer.warmup-steps", ["-1"], "at least 0"),
    (TRAIN, "optimizer.cooldown-steps", ["-1", "1001"], "at least 0|at most steps, which is 1000"),
    (TRAIN, "optimizer.final-lr", ["-0.1", "2", "nan"], "[0, 1]|number"),
    (TRAIN, "runtime.device", ["tpu", "cuda:1"], "auto, cpu, cuda"),
    (TRAIN, "runtime.dtype", ["float16"], "auto, float32, bfloat16"),
    (TRAIN, "runtime.kernels", ["cuda"], "auto, triton, torch"),
    (TRAIN, "runtime.compile", ["maybe", "1"], "true or false"),
    (TRAIN, "runtime.shard-size", ["0"], "at least 1"),
    (TRAIN, "runtime.threads", ["0", "-2"], "at least 1"),
    (TRAIN, "runtime.loss-chunk-size", ["0"], "at least 1"),
    (TRAIN, "runtime.timeout-minutes", ["0", "nan", "inf"], "above 0|number"),
    (TRAIN, "checkpoint.every", ["0"], "at least 1"),
    (TRAIN, "checkpoint.keep-last", ["0"], "at least 1"),
    (TRAIN, "checkpoint.keep-every", ["0"], "at least 1"),
    (TRAIN, "validation.every", ["0"], "at least 1"),
    (TRAIN, "validation.rows", ["0", "-4"], "at least 1"),
    (TRAIN, "validation.num-steps", ["0", "1,0", "4097", "1,1000000", "", "1,x"], "at least 1|at most 4096|whole"),
    (TRAIN, "health.collapse-correlation", ["nan", "2"], "[-1, 1]|number"),
    (TRAIN, "health.collapse-checks", ["0"], "at least 1"),
    (TRAIN, "health.ignored-state-gap", ["nan", "5"], "[-1, 1]|number"),
    (TRAIN, "health.skipped-steps", ["0"], "at least 1"),
    (TRAIN, "spikes.factor", ["1", "0", "nan", "inf"], "(1, inf)|number"),
    (TRAIN, "spikes.window", ["0"], "at least 1"),
    (TRAIN, "spikes.margin", ["-1"], "at least 0"),
    (TRAIN, "spikes.max-rewinds", ["-1"], "at least 0"),
    (TRAIN, "data.task.min-length", ["0", "99"], "at least 1|at least min_length"),
    (TRAIN, "data.task.max-length", ["1"], "at least min_length, 4"),
    (TRAIN, "data.task.curriculum-fraction", ["-0.1", "2", "nan"], "[0, 1]|number"),
    (TRAIN, "data.task.note-densities", ["2", "0,nan"], "[0, 1]|number"),
    (PACKED, "data.packed.restart-positions", ["true"], "document_masking: true"),
    (PREPARE, "tokens", ["-1", "0", "inf", "nan", "1B"], "above 0|number"),
    (PREPARE, "vocab-size", ["0", "-1", "287"], "at least 288"),
    (PREPARE, "tokenizer-documents", ["0"], "at least 1"),
    (PREPARE, "sequence-length", ["1", "0", "-5"], "at least 2"),
    (PREPARE, "validation-share", ["0", "1", "-0.5", "nan"], "(0, 1)|number"),
    (PREPARE, "policy", ["first-fit"], "concat, best-fit, huginn"),
    (PREPARE, "executor", ["dask"], "local, datatrove, slurm, ray"),
    (PREPARE, "files", ["0"], "at least 1"),
    (PREPARE, "workers", ["0", "-1"], "at least 1"),
    (PREPARE, "part-bytes", ["0"], "at least 1"),
    (PREPARE, "seed", ["-1"], "at least 0"),
    (PREPARE, "filters.ngram-words", ["0"], "at least 1"),
    (PREPARE, "filters.buckets", ["0"], "at least 1"),
    (PREPARE, "slurm.time", ["soon", "12"], "hours:minutes:seconds"),
    (PREPARE, "slurm.cpus-per-task", ["0"], "at least 1"),
    (PREPARE, "slurm.mem-per-cpu-gb", ["0"], "at least 1"),
    (PREPARE, "category-shares", ["{text: 0}", "{text: .nan}", "70", "{web: 1}"], "above 0|number|mapping|names web"),
    (ROWS, "block", ["0", "7"], "at least 8"),
    (ROWS, "validation-share", ["0", "1", "nan"], "(0, 1)|number"),
    (ROWS, "when-too-long", ["split"], "refuse, drop, cut"),
    (ROWS, "format.prompt", ["Question:", "{question} {question}"], "{question} once"),
    (ROWS, "format.end-think", [""], "must not be empty"),
    (CURATE, "seed", ["-1"], "at least 0"),
    (AVERAGE, "decay", ["-0.1", "1", "nan"], "[0, 1)|number"),
    (AVERAGE, "last", ["1", "0"], "at least 2"),
    (AVERAGE, "every", ["0", "-1"], "at least 1"),
    (AVERAGE, "method", ["median"], "ema, uniform"),
    (PLAN, "num-gpus", ["0", "-1", "two"], "at least 1|whole number"),
    (PLAN, "tokens", ["-5", "0"], "at least 1"),
    (PLAN, "utilisation", ["0", "-1", "1.1", "nan"], "(0, 1]|number"),
    (PLAN, "device", ["tpu"], "a100, h100, h200, mi300x, mi250x"),
    (PLAN, "run.runtime.shard-size", ["3"], "num_gpus is 8; it must be a multiple of run.runtime.shard_size, 3"),
    (PLAN, "run.steps", ["0"], "at least 1"),
    (["plan"], "finetuning.shape", ["large"], "tiny, small, huginn-3.5b"),
    (["plan"], "finetuning.backprop-depth", ["0"], "at least 1"),
    (["plan"], "finetuning.lora-rank", ["0"], "at least 1"),
    (DENSE, "run.optimizer.name", ["huginn"], "trained with adamw or muon"),
    (DENSE, "run.steps", ["0"], "at least 1"),
]  # fmt: skip
CASES = [(start, option, value, allowed) for start, option, values, allowed in NUMBERS for value in values]


@pytest.mark.parametrize(("start", "option", "value", "allowed"), CASES)
def test_wrong_value_names_the_option_and_what_is_allowed(start, option, value, allowed, capsys, folder):
    message = refused([*start, f"--{option}={value}"], capsys, folder)
    assert option.rpartition(".")[2].replace("-", "_") in message
    assert any(part in message for part in allowed.split("|")), message


@pytest.mark.parametrize("start", [TRAIN, PREPARE, ROWS, CURATE, AVERAGE, DENSE], ids=lambda start: start[0])
@pytest.mark.parametrize("out", ["", "  "])
def test_empty_output_folder_is_refused(start, out, capsys, folder):
    message = refused([*start, "--out", out], capsys, folder)
    assert message.startswith(f"out is {out!r}; it must not be empty, for example --out ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "run"], "data is required"),
        (["train", "--data.task.name", "shell_game"], "out is required"),
        (["train", "--out", "run", "--data.task.min-length", "3"], "data.task.name is required"),
        ([*TRAIN, "--data.packed.path", "x"], "data: exactly one of packed, task, puzzles must be given, not packed"),
        ([*TRAIN, "--data.task", "null"], "data: exactly one of packed, task, puzzles must be given, not none"),
        (["train", "--out", "run", "--data.puzzles.domains", ""], "data.puzzles.domains is empty"),
        (["train", "--out", "run", "--data.packed.path", ""], "data.packed.path is ''"),
        ([*TRAIN, "--optimizer", "{cooldown_steps: 5, schedule: cosine}"], "optimizer.cooldown_steps is 5"),
        ([*TRAIN, "--lr", "1"], "unknown option --lr; did you mean --optimizer.lr?"),
        ([*TRAIN, "--model.width", "3"], "unknown option --model.width"),
        ([*TRAIN, "--optimizer.learning-rate", "1"], "unknown option --optimizer.learning-rate"),
        ([*TRAIN, "--batchsize", "1"], "unknown option --batchsize; did you mean --batch-size?"),
        ([*TRAIN, "--data.path", "x"], "unknown option --data.path; did you mean --data.packed.path?"),
        ([*TRAIN, "--steps"], "--steps needs a value"),
        ([*TRAIN, "--steps", "--seed", "1"], "--steps needs a value"),
        ([*TRAIN, "--model", "nowhere.yaml"], "model: 'nowhere.yaml' does not exist"),
        ([*TRAIN, "--objective", "last"], "a field of this section: objective.every, objective.gated"),
        ([*TRAIN, "--model", "{n_embd: 3"], "model is '{n_embd: 3', which is not YAML"),
        ([*TRAIN, "--optimizer", "{lr: fast}"], "optimizer.lr is 'fast'; it must be a number"),
        ([*TRAIN, "extra"], "'extra' is not an option"),
        (["prepare", "--out", "data"], "source is empty"),
        (["prepare", "--out", "data", "--source", "a,a"], "sources: the name 'a' is used twice"),
        ([*PREPARE, "--sources", "{name: a}"], "sources[0].address is required"),
        ([*PREPARE, "--sources", "{name: a, address: x, weight: 0}"], "sources[0].weight is 0.0"),
        ([*PREPARE, "--sources", "{name: a, address: x, weight: .nan}"], "sources[0].weight is nan"),
        ([*PREPARE, "--sources", "{name: a, address: x, fields: []}"], "sources[0].fields is empty"),
        ([*PREPARE, "--sources", "web"], "sources[0] is 'web'; it must be a mapping with the fields name, address"),
        (["prepare-reasoning", "--out", "data", "--tokenizer", "t.json", "--rows", "[]"], "rows is empty"),
        ([*ROWS, "--rows", "{path: a, limit: 0}"], "rows[1].limit is 0"),
        ([*ROWS, "--rows", "{path: a, fields: {quest: q}}"], "rows[1].fields of a names ['quest']"),
        ([*ROWS, "--rows", "{path: a, answer_format: xml}"], "answer_format is 'xml'; it must be one of plain, gsm8k"),
        (["curate", "--out", "set", "--pool", "[]"], "pool is empty"),
        ([*CURATE, "--stages", "{name: a}"], "stages[0] is {'name': 'a'}; it must name its kind"),
        ([*CURATE, "--stages", "[{stage: quality}, {stage: quality}]"], "stages: two are called 'quality'"),
        ([*CURATE, "--stages", "quality"], "stages[0] is 'quality'; it must be a mapping"),
        (["average", "--out", "a"], "model is required"),
        (["plan", "--num-gpus", "8"], "num_gpus is 8; it needs --run FILE"),
        (["plan", "--tokens", "8"], "tokens is 8; it needs --run FILE"),
        (["plan", "--run", "run.yaml"], "num_gpus is required"),
        ([*PLAN, "--finetuning.shape", "tiny"], "finetuning is"),
        (["plan", "--run", "nowhere.yaml", "--num-gpus", "8"], "run: 'nowhere.yaml' does not exist"),
        (["train-dense", "--model", "m", "--out", "o"], "run is required"),
        ([*DENSE, "--run.data", "{task: {name: shell_game}}"], "run.data: exactly one of"),
        ([*DENSE, "--run.data.packed", "null", "--run.data.task.name", "shell_game"], "data is null and run.data"),
        ([*PLAN, "--num-gpus", "100"], "do not divide among 100 ranks"),
        ([*ROWS, "--format.end-think", "<|begin_think|>"], "format.begin_think, end_think, begin_answer"),
        ([*DENSE, "--data.path", "d", "--data.document-masking", "true"], "data.restart_positions is false"),
    ],
)  # fmt: skip
def test_wrong_combination_names_the_options(arguments, message, capsys, folder):
    assert message in refused(arguments, capsys, folder)


CONFIG_FILES = {
    "not YAML": ("a: [1,", "is not YAML (line "),
    "key twice": ("steps: 3\nsteps: 4", "is not YAML (line 2: steps is given twice)"),
    "section twice": (
        "optimizer: {lr: 1}\nmodel: {n_embd: 64}\noptimizer: {lr: 2}",
        "line 3: optimizer is given twice",
    ),
    "tabs": ("a:\n\t- b", "is not YAML (line 2"),
    "a list": ("- a\n- b\n", "holds a list; it must hold options"),
    "text": ("just text\n", "holds a single value; it must hold options"),
    "a number": ("42\n", "holds a single value; it must hold options"),
    "bytes": ("\x00\x01", "is not YAML"),
    "an unknown option": ("no_such_option: 1\n", "unknown option no_such_option"),
    "itself": ("config: FILE\n", "unknown option config"),
    "its own mapping": ("no_such_option: &a {b: *a}\n", "unknown option no_such_option"),
}


@pytest.mark.parametrize("kind", CONFIG_FILES)
@pytest.mark.parametrize("verb", VERBS)
def test_bad_config_file_is_one_line(verb, kind, capsys, folder):
    content, message = CONFIG_FILES[kind]
    (folder / "bad.yaml").write_text(content.replace("FILE", "bad.yaml"))
    error = refused([verb, "--config", "bad.yaml"], capsys, folder)
    assert message in error
    assert "bad.yaml" in error or "unknown option" in error


@pytest.mark.parametrize("verb", VERBS)
def test_missing_config_file_is_named(verb, capsys, folder):
    assert "config: 'nowhere.yaml' does not exist" in refused([verb, "--config", "nowhere.yaml"], capsys, folder)
    assert "config: '.' is a folder" in refused([verb, "--config=."], capsys, folder)


def test_section_that_names_its_own_file_is_refused(capsys, folder):
    (folder / "self.yaml").write_text("run: self.yaml\nnum_gpus: 8\n")
    assert "unknown option run.run" in refused(["plan", "--config", "self.yaml"], capsys, folder)
    (folder / "model.yaml").write_text("out: o\nmodel: model.yaml\ndata: {packed: {path: d}}\n")
    assert "unknown option model.out" in refused(["train", "--config", "model.yaml"], capsys, folder)


def test_value_that_contains_itself_is_refused(capsys, folder):
    (folder / "loop.yaml").write_text("out: o\npool: [{path: p}]\nstages: [{stage: teacher, extra: &a {b: [*a]}}]\n")
    assert "stages[0].extra.b[0] contains itself" in refused(["curate", "--config", "loop.yaml"], capsys, folder)


STAGES = [
    ("{stage: filter}", "'filter' is not a kind of stage; known are"),
    ("{stage: teacher, writer: {endpoint: {url: here, model: m}}}", "stages.teacher.writer.endpoint.url is 'here'"),
    ("{stage: teacher, writer: {local: {model: m, num_steps: 9999}}}", "local.num_steps is 9999; it must be"),
    ("{stage: teacher, writer: {local: {model: m, temperature: -1}}}", "writer.local.temperature is -1.0"),
    ("{stage: teacher, writer: {local: {model: m, batch_size: 0}}}", "writer.local.batch_size is 0"),
    ("{stage: teacher, writer: {}}", "stages.teacher.writer: exactly one of endpoint, local"),
    ("{stage: teacher, name: t, prices: {tokens_in: -1}}", "stages.t.writer is required"),
    ("{stage: domains, labeller: {clusters: {count: 0}}}", "stages.domains.labeller.clusters.count is 0"),
    ("{stage: grade_traces, grader: {rule: {timeout_s: .inf}}}", "stages.grade_traces.grader.rule.timeout_s is inf"),
    ("{stage: grade_traces, grader: {rule: {}, judge: null, jury: {}}}", "unknown option stages.grade_traces.grader"),
    ("{stage: diverse, size: 5, weights: {a: -1}}", "stages.diverse.weights.a is -1"),
    ("{stage: random, size: 0}", "stages.random.size is 0; it must be at least 1"),
    ("{stage: lengths, tokenizer: t, at_least: -1}", "stages.lengths.at_least is -1"),
    ("{stage: quality, filters: [taste]}", "stages.quality.filters names ['taste']; known are"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "message"), STAGES)
def test_wrong_stage_is_refused_before_any_row_is_read(stage, message, capsys, folder):
    assert message in refused([*CURATE, "--stages", stage], capsys, folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN[:-1], "chess"], "data.task.name is 'chess'; known tasks are modular_arithmetic"),
        ([*TRAIN, "--model.vocab-size", "8"], "model.vocab_size"),
        ([*TRAIN, "--model.block-size", "8"], "model.block_size"),
        ([*TRAIN, "--init-from", "nowhere"], "init_from: no such folder 'nowhere'"),
        ([*TRAIN, "--init-from", "./runs/first"], "init_from: no such folder './runs/first'"),
        (["train", "--out", "run", "--data.puzzles.domains", "juggle"], "data.puzzles.domains names ['juggle']"),
        (["train", "--out", "a/run", "--data.puzzles", "{domains: [swap], max_length: 99}"], "max_length is 99"),
        ([*PACKED, "--model.block-size", "512"], "data does not exist"),
        (AVERAGE, "model: 'run' is not a run folder"),
        (CURATE, "rows.jsonl does not exist"),
        ([*CURATE, "--imports", "nopkg"], "imports: 'nopkg' cannot be imported"),
        (ROWS, "t.json does not exist"),
    ],
)
def test_fault_that_a_verb_finds_leaves_nothing_behind(arguments, message, capsys, folder):
    assert message in refused(arguments, capsys, folder, status=1)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: OptimizerConfig(lr=math.nan), "lr"),
        (lambda: OptimizerConfig(gradient_clip=math.nan), "gradient_clip"),
        (lambda: OptimizerConfig(betas=(0.9, math.nan)), "betas"),
        (lambda: SpikeConfig(factor=math.nan), "factor"),
        (lambda: SpikeConfig(factor=math.inf), "factor"),
        (lambda: HealthConfig(collapse_correlation=math.nan), "collapse_correlation"),
        (lambda: RuntimeConfig(timeout_minutes=math.nan), "timeout_minutes"),
        (lambda: RunConfig("o", DataConfig(task=TaskDataConfig("shell_game")), max_hours=math.nan), "max_hours"),
        (lambda: RunConfig("o", DataConfig(task=TaskDataConfig("shell_game")), max_hours=math.inf), "max_hours"),
        (lambda: ModelConfig(norm_eps=math.nan), "norm_eps"),
        (lambda: ModelConfig(rope_base=math.inf), "rope_base"),
        (lambda: PrepareConfig(out="o", source=["a"], tokens=math.nan), "tokens"),
        (lambda: PrepareConfig(out="o", source=["a"], validation_share=math.nan), "validation_share"),
        (lambda: SourceConfig("a", "b", weight=math.nan), "weight"),
        (lambda: AverageConfig(model="a", out="b", decay=math.nan), "decay"),
        (lambda: PlanConfig(utilisation=math.nan), "utilisation"),
    ],
)
def test_option_classes_refuse_numbers_that_are_not_finite(build, field):
    with pytest.raises(ValueError, match=f"^{field} is (nan|inf)"):
        build()
