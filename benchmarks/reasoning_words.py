"""Which reasoning tasks in words need depth? One model of 1M parameters on a mixture of reasoning-gym tasks.

    pip install reasoning-gym==0.1.25
    python -m benchmarks reasoning_words [--seeds 0,1,2] [--steps 6000] [--tasks chain_sum,gcd] [--keep FOLDER]

Examples are a question and its answer in words, as the package writes them, with a tokenizer trained on them. Three
models see the same rows: the recurrent one; one of equal parameters, whose layers run once; and one of as many
different layers as the recurrent one runs at its mean depth. All train with the same FLOPs. Answers to held-out
questions are written greedily and graded by the package. Data, runs (from their checkpoints) and measurements are kept
in FOLDER, and the same command continues after an interruption. Hours of CPU for each model; --device cuda trains on a
GPU. --trial is the recurrent model alone, to see which tasks can be learned. Writes results/reasoning_words.json.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import reasoning_gym
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.common import kept, trained_run, write_result
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.preparation.rows import row_schema, write_parquet
from recurrent_depth.data.tokenizer import load_tokenizer
from recurrent_depth.files import atomic_folder
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import mean_training_flops
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.reasoning.dataset import Tokens, lay_out
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    ValidationConfig,
)

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_digits": 1, "max_digits": 2, "max_terms": 5},
    "products": {"min_digits": 1, "max_digits": 2},
    "gcd": {"max_value": 200},
    "count_bits": {"max_n": 100_000},
    "spell_backward": {"max_word_len": 6},
    "letter_counting": {"max_words": 6},
    "caesar_cipher": {"max_words": 3},
    "simple_equations": {},
    "leg_counting": {"max_animals": 4, "max_instances": 5},
    "color_cube_rotation": {},
    "family_relationships": {},
    "syllogism": {},
}
"""Options of each task, by name in the package."""

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
EXAMPLES, HELD_OUT, LONGEST, ANSWER = 20_000, 200, 255, 32
"""Training examples and held-out questions of a task; tokens of a row, and of an answer at most."""

VOCABULARY = 1024
PAD, END_OF_QUESTION, END = SPECIAL = ["<|pad|>", "<|answer|>", "<|end|>"]  # ids 0, 1, 2
SHAPE = ModelConfig(
    n_embd=128, n_heads=4, intermediate_size=384, n_layers_in_recurrent_block=2, vocab_size=VOCABULARY, block_size=512,
    mean_recurrence=8, mean_backprop_depth=4,
)  # fmt: skip
_ONCE: dict[str, Any] = {"mean_recurrence": 1, "mean_backprop_depth": None, "sampling_scheme": "fixed"}
SHAPES = {
    "recurrent": SHAPE,
    "equal parameters": dataclasses.replace(SHAPE, **_ONCE),
    "equal depth": dataclasses.replace(SHAPE, **_ONCE, n_layers_in_recurrent_block=2 * SHAPE.mean_recurrence),
}


def dataset(task: str, split: str, options: dict[str, Any]) -> Any:
    """Return a data set of the package; held-out questions have another seed."""
    size, seed = (EXAMPLES, 1) if split == "train" else (HELD_OUT, 2)
    return reasoning_gym.create_dataset(task, size=size, seed=seed, **options)


def train_word_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE in which every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def example(tokenizer: Tokenizer, question: str, answer: str) -> Tokens:
    """Return a question and its answer, with the loss on the answer and its end."""
    prompt, reply = (tokenizer.encode(text).ids for text in (question + END_OF_QUESTION, answer + END))
    return Tokens([*prompt, *reply], [*[IGNORE_INDEX] * (len(prompt) - 1), *reply, IGNORE_INDEX])


def prepare(out: Path, tasks: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write the rows of the mixture and their tokenizer; return the examples of each task by what became of them."""
    examples = {task: [(e["question"], e["answer"]) for e in dataset(task, "train", TASKS[task])] for task in tasks}
    held_out = {task: {e["question"] for e in dataset(task, "validation", TASKS[task])} for task in tasks}
    texts = [text for members in examples.values() for pair in members[:1000] for text in pair]
    tokenizer, counts, kept_examples = train_word_tokenizer(texts), {}, []
    for task, members in examples.items():
        new = [pair for pair in members if pair[0] not in held_out[task]]
        fitting = [row for row in (example(tokenizer, *pair) for pair in new) if len(row.ids) <= LONGEST + 1]
        counts[task] = {"drawn": len(members), "not held out": len(new), "fitting": len(fitting)}
        kept_examples += fitting
    rows = lay_out(kept_examples, LONGEST + 1, SPECIAL.index(PAD), pack=True)
    schema = row_schema(VOCABULARY, labels=True)
    with atomic_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        for split, part in (("train", rows[64:]), ("validation", rows[:64])):
            (folder / split).mkdir()
            columns = {column: [getattr(row, column) for row in part] for column in schema.names}
            write_parquet(pa.table(columns, schema=schema), folder / split / "part-00000.parquet")
    return counts


def equal_flops_steps(model: str, steps: int) -> int:
    """Return the training steps of a model that have the FLOPs of `steps` of the recurrent one."""
    return round(steps * mean_training_flops(SHAPE, LONGEST) / mean_training_flops(SHAPES[model], LONGEST))


def run_config(model: str, seed: int, steps: int, data: Path, out: Path, device: Literal["cpu", "cuda"]) -> RunConfig:
    rows = PackedDataConfig(str(data), document_masking=True, restart_positions=True)
    return RunConfig(
        out=str(out), data=DataConfig(packed=rows), model=SHAPES[model], steps=steps, batch_size=16, seed=seed,
        log_every=50, trackers=(),
        optimizer=OptimizerConfig(
            name="muon", lr=2e-3, weight_decay=0.0, warmup_steps=min(200, steps // 10), cooldown_steps=steps // 3
        ),
        runtime=RuntimeConfig(device=device, threads=1),
        checkpoint=CheckpointConfig(every=500),
        validation=ValidationConfig(every=500, rows=32, num_steps=(1, 8)),
    )  # fmt: skip


def accuracy(model: RecurrentDepthModel, tokenizer: Tokenizer, num_steps: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the share of right answers, and the mean score of the package, by task."""
    decoder, end, found = Decoder(model), SPECIAL.index(END), {}
    for task in tasks:
        questions = dataset(task, "validation", TASKS[task])
        entries = [questions[index] for index in range(HELD_OUT)]
        prompts = [tokenizer.encode(entry["question"] + END_OF_QUESTION).ids for entry in entries]
        options = Decoding(max_new_tokens=ANSWER, num_steps=num_steps, stop=(end,))
        scores = []
        order = sorted(range(HELD_OUT), key=lambda index: len(prompts[index]))
        for start in range(0, HELD_OUT, 50):
            part = order[start : start + 50]
            written = decoder.generate([prompts[index] for index in part], options).tokens
            for index, tokens in zip(part, written, strict=True):
                answer = tokenizer.decode([token for token in tokens if token != end])
                scores.append(float(questions.score_answer(answer, entries[index])))
        found[task] = {"right": sum(score >= 1 for score in scores) / HELD_OUT, "score": sum(scores) / HELD_OUT}
    return found


def saturates_at(by_depth: dict[int, float], within: float = 0.02) -> int:
    """Return the smallest number of core iterations whose accuracy is within two points of the best."""
    return min(r for r, value in by_depth.items() if value >= max(by_depth.values()) - within)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of the recurrent model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are trained")
    parser.add_argument("--trial", action="store_true", help="the recurrent model of the first seed alone; no result")
    parser.add_argument("--keep", default="build/reasoning-words", help="folder of data, runs and measurements")
    options = parser.parse_args()
    tasks, seeds, root = options.tasks.split(","), [int(seed) for seed in options.seeds.split(",")], Path(options.keep)
    data = root / "data"
    counts = kept(options.keep, "examples", partial(prepare, data, tasks))
    tokenizer, results = load_tokenizer(data), []
    for seed in seeds[:1] if options.trial else seeds:
        for name in ["recurrent"] if options.trial else SHAPES:
            steps = equal_flops_steps(name, options.steps)
            key = f"{name}-{steps}-{seed}".replace(" ", "-")
            model = load_run_model(trained_run(run_config(name, seed, steps, data, root / key, options.device)))
            result: dict[str, Any] = {"model": name, "seed": seed, "steps": steps, "parameters": model.num_parameters}
            result["accuracy"] = {
                str(r): kept(options.keep, f"{key}-{r}", partial(accuracy, model, tokenizer, r, tasks))
                for r in (DEPTHS if name == "recurrent" else (1,))
            }
            results.append(result)
            show(result, tasks)
    if not options.trial:
        write_result("reasoning_words", {"tasks": TASKS, "examples": counts, "runs": results})


def show(result: dict[str, Any], tasks: Sequence[str]) -> None:
    """Print the accuracy by task, and where it saturates."""
    print(f"{result['model']}, seed {result['seed']}, {result['steps']} training steps")
    for task in tasks:
        by_depth = {int(r): found[task]["right"] for r, found in result["accuracy"].items()}
        cells = " ".join(f"{100 * value:5.1f}" for value in by_depth.values())
        print(f"  {task:<22} {cells}   saturates at r = {saturates_at(by_depth)}", flush=True)


if __name__ == "__main__":
    main()
