"""A model in this process: a recurrent-depth model by our decoding engine, or any causal model of transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recurrent_depth.checks import check_at_least, check_not_empty, check_num_steps
from recurrent_depth.devices import choose_device, choose_dtype
from recurrent_depth.extras import require
from recurrent_depth.files import file_hash, json_hash
from recurrent_depth.hub import check_folder_or_hub_name
from recurrent_depth.reasoning.curation.replies import Reply, ReplyCache
from recurrent_depth.runs import find_checkpoint, is_run
from recurrent_depth.terminal import progress

if TYPE_CHECKING:
    from recurrent_depth.generation.engine import Decoder


@dataclass(frozen=True)
class LocalConfig:
    """A model that this process loads. It takes the most likely token unless a temperature is given.

    Args:
        model: run folder, export, or any causal model of transformers (folder or hub name).
        max_new_tokens: tokens of the longest reply.
        chat: put the prompt into the tokenizer's chat template.
        stop: texts that end a reply; those that are one token of the vocabulary also end the decoding.
        num_steps: iterations of a recurrent-depth model; null takes its mean_recurrence.
        batch_size: prompts decoded together.
        temperature: of sampling.
        seed: of sampling.
        device: auto, cpu, cuda or cuda:N; auto is a GPU if there is one.
        dtype: dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
    """

    model: str
    max_new_tokens: int = 256
    chat: bool = False
    stop: list[str] = field(default_factory=list)
    num_steps: int | None = None
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_not_empty("model", self.model, "model: runs/first")
        for name in ("max_new_tokens", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        check_num_steps("num_steps", self.num_steps)
        check_at_least("temperature", self.temperature, 0)
        check_at_least("seed", self.seed, 0)

    def fingerprint(self) -> Any:
        """Return what decides the replies: the options and the hashes of the weights, or the hub name."""
        options = {name: value for name, value in asdict(self).items() if name not in ("device", "model")}
        return [options, model_fingerprint(self.model)]

    def check(self) -> None:
        """Raise if the model or a package is missing."""
        require("transformers", "recurrent-depth[curate]", "a model in this process")
        if not is_run(self.model):
            check_folder_or_hub_name(self.model)

    def open(self) -> "LocalWriter":
        """Load the model."""
        return LocalWriter(self)


def model_fingerprint(model: str) -> Any:
    """Return the hashes of a model's files (a checkpoint lists its own), or the hub name."""
    if is_run(model):
        return file_hash(find_checkpoint(model) / "checkpoint.json")
    if Path(model).is_dir():
        files = sorted(file for file in Path(model).rglob("*") if file.is_file())
        return [[file.relative_to(model).as_posix(), file_hash(file)] for file in files]
    return model


class LocalWriter:
    """Decodes fixed batches of prompts of similar length, and keeps the replies of each batch.

    The batches depend on the prompts alone, so a resumed run decodes the same batches as one that was not killed.
    """

    def __init__(self, config: LocalConfig) -> None:
        from recurrent_depth.generation.engine import Decoder
        from recurrent_depth.hf import RecurrentDepthForCausalLM
        from recurrent_depth.hf.loading import load_model

        self.config = config
        self.device = choose_device(config.device)
        self.model, self.tokenizer = load_model(config.model, choose_dtype(config.dtype, self.device), self.device)
        if self.tokenizer is None:
            raise ValueError(f"model: {config.model} has no tokenizer; put its tokenizer.json into the folder")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.decoder = Decoder(self.model) if isinstance(self.model, RecurrentDepthForCausalLM) else None
        self.stop_ids = _stop_ids(self.tokenizer, config.stop)
        self.fingerprint = json_hash(config.fingerprint())

    def write(self, prompts: Sequence[str], cache: ReplyCache) -> list[Reply]:
        """Return one reply per prompt."""
        keys = [json_hash([self.fingerprint, prompt]) for prompt in prompts]
        batches = list(_batches(dict(zip(keys, map(self._encode, prompts), strict=True)), self.config.batch_size))
        with progress(self.config.model, len(batches)) as advance:
            for batch in batches:
                if any(cache.get(key) is None for key in batch):
                    cache.put(dict(zip(batch, self._decode(list(batch.values())), strict=True)))
                advance()
        return [cache.replies[key] for key in keys]

    def _encode(self, prompt: str) -> list[int]:
        if not self.config.chat:
            return self.tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def _decode(self, prompts: list[list[int]]) -> list[Reply]:
        decoder = self.decoder
        written = self._by_transformers(prompts) if decoder is None else self._by_our_engine(decoder, prompts)
        return [self._reply(prompt, tokens) for prompt, tokens in zip(prompts, written, strict=True)]

    def _by_our_engine(self, decoder: "Decoder", prompts: list[list[int]]) -> list[list[int]]:
        from recurrent_depth.generation.request import Decoding

        options = Decoding(
            max_new_tokens=self.config.max_new_tokens,
            num_steps=self.config.num_steps,
            temperature=self.config.temperature,
            seed=self.config.seed,
            stop=self.stop_ids,
        )
        return decoder.generate(prompts, options).tokens

    def _by_transformers(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        config = self.config
        torch.manual_seed(config.seed)
        self.tokenizer.padding_side = "left"
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        sampling = {"temperature": config.temperature} if config.temperature else {}
        ids = self.model.generate(
            **inputs, max_new_tokens=config.max_new_tokens, eos_token_id=list(self.stop_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id, do_sample=config.temperature > 0, **sampling,
        )  # fmt: skip
        return [_until(row, self.stop_ids) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]

    def _reply(self, prompt: list[int], tokens: list[int]) -> Reply:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self.config.stop if stop in text]
        stopped = bool(ends) or (bool(tokens) and tokens[-1] in self.stop_ids)
        return Reply(
            text=text[: min(ends, default=len(text))],
            finish="stop" if stopped else "length",
            tokens_in=len(prompt),
            tokens_out=len(tokens),
        )


def _batches(prompts: dict[str, list[int]], size: int) -> Iterator[dict[str, list[int]]]:
    ordered = sorted(prompts.items(), key=lambda item: (len(item[1]), item[0]))
    for first in range(0, len(ordered), size):
        yield dict(ordered[first : first + size])


def _stop_ids(tokenizer: Any, texts: list[str]) -> tuple[int, ...]:
    known = tokenizer.get_vocab()
    ids = {tokenizer.eos_token_id, *(known.get(text) for text in [*texts, "<|end_turn|>"])}
    return tuple(sorted(ids - {None}))


def _until(tokens: list[int], stop: tuple[int, ...]) -> list[int]:
    """Return the tokens up to and including the first stop id, without the padding after it."""
    first = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: first + 1]
