"""Local writer: replies of a recurrent-depth model or a transformers model in this process."""

import pytest
import torch

from reasoning.curation.rows import example, run_stage
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.loading import load_model
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.reasoning.curation.replies import ReplyCache
from support import decode


class TestLocal:
    PROMPTS = ("the quick", "how many apples are there?", "the quick brown fox", "lazy dog")

    @staticmethod
    def config(folder, **changes):
        return LocalConfig(str(folder), max_new_tokens=6, num_steps=2, batch_size=2, **changes)

    def test_local_recurrent_model_replies_equal_single_prompt_decoding(self, chat_folder, tmp_path):
        replies = self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(tmp_path / "a.jsonl"))
        model, tokenizer = load_model(chat_folder)
        for prompt, reply in zip(self.PROMPTS, replies, strict=True):
            tokens = tokenizer(prompt)["input_ids"]
            alone = decode(model, [tokens], Decoding(max_new_tokens=6, num_steps=2)).tokens[0]
            assert reply.text == tokenizer.decode(alone, skip_special_tokens=True)
            assert (reply.tokens_in, reply.tokens_out, reply.finish) == (len(tokens), 6, "length")

    def test_local_transformers_model_decodes_greedily(self, chat_folder, tmp_path):
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(chat_folder)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            initializer_range=0.5,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        replies = self.config(tmp_path / "llama").open().write(self.PROMPTS, ReplyCache(tmp_path / "a.jsonl"))
        for prompt, reply in zip(self.PROMPTS, replies, strict=True):
            ids_ = tokenizer(prompt, return_tensors="pt")["input_ids"]
            for _ in range(6):
                ids_ = torch.cat([ids_, model(ids_).logits[:, -1].argmax(-1, keepdim=True)], 1)
            written = ids_[0, -6:].tolist()
            stop = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_turn|>")}
            written = written[: next((i + 1 for i, token in enumerate(written) if token in stop), 6)]
            assert reply.text == tokenizer.decode(written, skip_special_tokens=True)

    def test_local_reply_ends_at_stop_text(self, chat_folder, tmp_path):
        whole = self.config(chat_folder).open().write(self.PROMPTS[:1], ReplyCache(tmp_path / "a.jsonl"))[0].text
        config = self.config(chat_folder, stop=[whole[3:5]])
        cut = config.open().write(self.PROMPTS[:1], ReplyCache(tmp_path / "b.jsonl"))[0]
        assert (cut.text, cut.finish) == (whole[: whole.find(whole[3:5])], "stop")
        assert config.fingerprint() != self.config(chat_folder).fingerprint()

    def test_local_writer_decodes_only_missing_batches_after_interrupt(self, chat_folder, tmp_path):
        class WatchedCache(ReplyCache):
            allowed = 99

            def put(self, replies):
                if len(kept) == self.allowed:
                    raise KeyboardInterrupt
                kept.append(len(replies))
                super().put(replies)

        kept, file = [], tmp_path / "a.jsonl"
        cache = WatchedCache(file)
        cache.allowed = 1
        with pytest.raises(KeyboardInterrupt):
            self.config(chat_folder).open().write(self.PROMPTS, cache)
        resumed = self.config(chat_folder).open().write(self.PROMPTS, WatchedCache(file))
        assert kept == [2, 2]
        assert resumed == self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(tmp_path / "b.jsonl"))
        assert file.read_bytes() == (tmp_path / "b.jsonl").read_bytes()

    def test_difficulty_stage_runs_local_model(self, chat_folder, tmp_path):
        writer = {"model": str(chat_folder), "max_new_tokens": 4, "num_steps": 2}
        models = [{"name": "ours", "writer": {"local": writer}, "prompt": "Q: {question}"}]
        outcome = run_stage({"stage": "difficulty", "models": models}, [example(i) for i in range(3)], tmp_path)
        assert len(outcome.examples) + len(outcome.drops) == 3
        counts = outcome.facts["ours"]
        assert counts["correct"] + counts["wrong"] + counts["undecided"] == 3
        assert len(outcome.examples) == counts["wrong"]
