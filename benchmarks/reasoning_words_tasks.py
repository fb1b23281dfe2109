"""The tasks of `python -m benchmarks reasoning_words`: rows for training, and task files for lm-eval.

Questions, answers and grading are those of the package reasoning-gym. An example reads

    QUESTION
    Answer: ANSWER<|end_text|>

and the rows of a mixture hold one example after the other, as a prompt with examples does.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import reasoning_gym
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recurrent_depth.data.preparation.rows import row_schema, write_parquet
from recurrent_depth.files import atomic_folder, write_json
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.reasoning.dataset import FineTuningRow, Tokens, lay_out

Options = dict[str, dict[str, Any]]
"""Options of each task, by name in the package."""

TASKS: Options = {
    "chain_sum": {"min_digits": 1, "max_digits": 1, "max_terms": 4},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "max_digits": 1},
    "gcd": {"max_value": 100},
    "count_bits": {"max_n": 1000},
    "number_sequence": {"max_complexity": 1},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 10},
    "syllogism": {},
    "aiw": {},
    "word_sequence_reversal": {"min_words": 2, "max_words": 4},
}

TRIED: Options = {
    "chain_sum": {"min_digits": 1, "max_digits": 1, "max_terms": 5},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "max_digits": 1},
    "gcd": {"max_value": 200},
    "count_bits": {"max_n": 10_000},
    "spell_backward": {"max_word_len": 6},
    "letter_counting": {"max_words": 6},
    "number_sequence": {"max_complexity": 2},
    "leg_counting": {"max_animals": 3, "max_instances": 4},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "family_relationships": {},
    "syllogism": {},
    "color_cube_rotation": {},
}
"""The tasks of the trial. Five of them are left out of `TASKS`, most others are easier there."""

_CONTENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gcd": lambda entry: sorted(entry["metadata"]["numbers"]),
    "simple_equations": lambda entry: entry["metadata"]["equation"].replace(entry["metadata"]["variable"], "x"),
}
"""What makes two questions of a task the same; of the others the text, in lower case."""

EXAMPLES, HELD_OUT, SHOTS = 20_000, 256, 64
"""Training examples and held-out questions of a task; training examples that few-shot prompts take theirs from."""

LONGEST, ANSWER = 255, 32  # tokens of a row; of an answer at most
VOCABULARY = 1024
PAD, END = SPECIAL = ["<|pad|>", "<|end_text|>"]  # ids 0, 1
DELIMITER, PREFIX = "\nAnswer:", "words_"


def entries(task: str, options: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return questions of the package with their answers; entry n of the package depends on seed + n only."""
    size, seed = (EXAMPLES, 0) if split == "train" else (HELD_OUT, 1_000_000)
    return list(reasoning_gym.create_dataset(task, size=size, seed=seed, **options))


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


def tokens_of(tokenizer: Tokenizer, entry: dict[str, Any]) -> Tokens:
    """Return an example, with the loss on the answer and its end."""
    texts = entry["question"] + DELIMITER, f" {entry['answer']}{END}"
    prompt, reply = (tokenizer.encode(text).ids for text in texts)
    return Tokens([*prompt, *reply], [*[IGNORE_INDEX] * (len(prompt) - 1), *reply, IGNORE_INDEX])


def content(task: str, entry: dict[str, Any]) -> str:
    """Return a text that is the same for two questions that ask the same."""
    return str(_CONTENT.get(task, lambda e: e["question"].lower())(entry))


def prepare(out: Path, tasks: Options) -> dict[str, Any]:
    """Write rows, tokenizer and lm-eval tasks, unless they are there; return counts of each task's examples."""
    counts_file = out / "examples.json"
    if not counts_file.is_file():
        _prepare(out, tasks)
    counts: dict[str, Any] = json.loads(counts_file.read_text())
    if list(counts) != list(tasks):
        raise SystemExit(f"{out} holds rows of {', '.join(counts)}; give another folder for other tasks")
    return counts


def _prepare(out: Path, tasks: Options) -> None:
    drawn = {task: entries(task, options, "train") for task, options in tasks.items()}
    held_out = {task: entries(task, options, "validation") for task, options in tasks.items()}
    asked = {task: {content(task, entry) for entry in held_out[task]} for task in tasks}
    examples = {task: [e for e in drawn[task] if content(task, e) not in asked[task]] for task in tasks}
    texts = [text for members in examples.values() for e in members[:1000] for text in (e["question"], e["answer"])]
    tokenizer, counts = train_word_tokenizer(texts), {}
    tokens = {task: [tokens_of(tokenizer, entry) for entry in members] for task, members in examples.items()}
    for task in tasks:
        commonest = Counter(entry["answer"] for entry in held_out[task]).most_common(1)[0][1]
        counts[task] = {
            "drawn": len(drawn[task]), "not_held_out": len(examples[task]), "held_out": HELD_OUT,
            "mean_tokens": sum(len(each.ids) for each in tokens[task]) / len(tokens[task]),
            "commonest_answer": commonest / HELD_OUT,
        }  # fmt: skip
    rows = mixed_rows([each for members in tokens.values() for each in members])
    schema = row_schema(VOCABULARY, labels=True)
    with atomic_folder(out) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        for split, part in (("train", rows[64:]), ("validation", rows[:64])):
            (folder / split).mkdir()
            columns = {column: [getattr(row, column) for row in part] for column in schema.names}
            write_parquet(pa.table(columns, schema=schema), folder / split / "part-00000.parquet")
        write_tasks(folder / "tasks", out / "tasks", {t: (examples[t][:SHOTS], held_out[t]) for t in tasks})
        write_json(folder / "examples.json", counts)


def mixed_rows(examples: list[Tokens]) -> list[FineTuningRow]:
    """Return rows that hold whole examples in a random order, one after the other."""
    order, rows = random.Random(0).sample(examples, len(examples)), [Tokens([], [])]
    for each in order:
        if len(each.ids) > LONGEST + 1:
            continue
        if len(rows[-1].ids) + len(each.ids) > LONGEST + 1:
            rows.append(Tokens([], []))
        rows[-1].ids.extend(each.ids)
        rows[-1].labels.extend(each.labels)
    return lay_out(rows, LONGEST + 1, SPECIAL.index(PAD), pack=False)


def write_tasks(folder: Path, final: Path, rows: dict[str, tuple[list[Any], list[Any]]]) -> None:
    """Write an lm-eval task for each task, with its rows (shots, questions); `folder` will be renamed to `final`."""
    folder.mkdir()
    (folder / "grading.py").write_text(f"from {__name__} import grade\n")
    for task, parts in rows.items():
        files = {}
        for split, part in zip(("train", "test"), parts, strict=True):
            name = f"{task}-{split}.jsonl"
            (folder / name).write_text("".join(json.dumps(_document(entry)) + "\n" for entry in part))
            files[split] = str((final / name).resolve())
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("right", "score")]
        description = {
            "task": PREFIX + task, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": files}, "fewshot_split": "train", "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}" + DELIMITER, "doc_to_target": "{{answer}}",
            "target_delimiter": " ", "fewshot_delimiter": END,
            "generation_kwargs": {"until": [END], "do_sample": False, "max_gen_toks": ANSWER}, "metric_list": metrics,
        }  # fmt: skip
        text = yaml.safe_dump(description) + "process_results: !function grading.grade\n"
        (folder / f"{task}.yaml").write_text(text)


def _document(entry: dict[str, Any]) -> dict[str, str]:
    document = {"question": entry["question"], "answer": entry["answer"], "entry": json.dumps(entry, default=str)}
    if grade(document, [entry["answer"]])["right"] != 1:
        raise ValueError(f"the verifier of reasoning-gym refuses the package's own answer to {document}")
    return document


def grade(document: dict[str, str], written: list[str]) -> dict[str, float]:
    """Return whether an answer is right, and its score, by the verifier of the package; lm-eval calls this."""
    entry = json.loads(document["entry"])
    score = float(_verifier(entry["metadata"]["source_dataset"])(written[0].strip(), entry))
    return {"right": float(score >= 1), "score": score}


@cache
def _verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    return reasoning_gym.get_score_answer_fn(task)
