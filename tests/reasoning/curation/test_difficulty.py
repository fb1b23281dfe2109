"""Difficulty from attempts: recorded ones, our own model's, another model's, a server's; and trace lengths."""

import json

import pytest
import torch

from reasoning.curation.chat_server import asked, chat_server
from reasoning.curation.rows import example, ids, reasons, run_stage
from recurrent_depth.data.layout import DataError
from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.hf.loading import load_model, unwrap
from recurrent_depth.reasoning.curation.local import LocalConfig
from recurrent_depth.reasoning.curation.replies import ReplyCache


def recorded(folder, name, attempts):
    lines = [json.dumps({"id": f"pool/{number}", "attempt": attempt}) + "\n" for number, attempt in attempts.items()]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"name": name, "recorded": f"{name}.jsonl"}


class TestRecorded:
    def test_a_question_that_any_model_solves_goes(self, tmp_path):
        models = [
            recorded(tmp_path, "small", {0: "#### 1", 1: "#### 7", 2: "#### 8", 3: "4.0"}),
            recorded(tmp_path, "large", {0: "1", 1: "so\n#### 2.00", 2: "", 3: "5"}),
        ]
        outcome = run_stage({"stage": "difficulty", "models": models}, [example(i) for i in range(4)], tmp_path)
        assert ids(outcome.examples) == [2]
        assert reasons(outcome) == {0: "solved by small", 1: "solved by large", 3: "solved by small"}
        assert outcome.drops[0].detail == "small, large"
        assert outcome.facts == {
            "small": {"correct": 2, "wrong": 2, "undecided": 0, "no attempt": 0},
            "large": {"correct": 2, "wrong": 2, "undecided": 0, "no attempt": 0},
        }

    def test_rows_that_the_file_lacks_are_counted_drops(self, tmp_path):
        models = [
            recorded(tmp_path, "small", {0: "9", 1: "9", 2: "9"}), recorded(tmp_path, "large", {0: "9", 3: "4"}),
        ]  # fmt: skip
        rows = [example(i) for i in range(4)]
        outcome = run_stage({"stage": "difficulty", "models": models}, rows, tmp_path)
        assert ids(outcome.examples) == [0]
        assert reasons(outcome) == {
            1: "no attempt by large", 2: "no attempt by large", 3: "solved by large",
        }  # fmt: skip
        assert outcome.facts["large"]["no attempt"] == 2
        kept = run_stage({"stage": "difficulty", "models": models, "keep_unknown": True}, rows, tmp_path)
        assert ids(kept.examples) == [0, 1, 2]

    def test_a_file_of_other_rows_is_an_error(self, tmp_path):
        model = recorded(tmp_path, "small", {7: "1"})
        with pytest.raises(DataError, match=r"no attempt at any of the 2 rows; it has pool/7, the pool has pool/0"):
            run_stage({"stage": "difficulty", "models": [model]}, [example(0), example(1)], tmp_path)

    @pytest.mark.parametrize("line", ['{"id": "pool/0"}', '{"id": 0, "attempt": "1"}', "{"])
    def test_a_damaged_line_is_named(self, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"id": "pool/0", "attempt": "1"}\n' + line + "\n")
        with pytest.raises(DataError, match="line 2"):
            run_stage({"stage": "difficulty", "models": [{"name": "a", "recorded": "a.jsonl"}]}, [example(0)], tmp_path)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
            run_stage(
                {"stage": "difficulty", "models": [{"name": "a", "recorded": "nowhere.jsonl"}]}, [example()], tmp_path
            )


def test_a_judge_that_answers_nonsense_is_counted_and_not_trusted(tmp_path):
    def judge(body):
        text = asked(body)
        return {"content": "Yes" if "is 0 plus" in text else "No" if "is 1 plus" in text else "Purple."}

    model = recorded(tmp_path, "small", {0: "one", 1: "nine", 2: "three"})
    with chat_server(judge) as server:
        grader = {"judge": {"writer": {"endpoint": {"url": server.url, "model": "judge"}}}}
        description = {"stage": "difficulty", "models": [model], "grader": grader}
        outcome = run_stage(description, [example(i) for i in range(3)], tmp_path)
    assert ids(outcome.examples) == [1]
    assert reasons(outcome) == {0: "solved by small", 2: "attempt by small not graded"}
    assert outcome.facts["small"] == {
        "correct": 1, "wrong": 1, "undecided": 1, "no attempt": 0, "why undecided": {"judge said 'Purple.'": 1},
    }  # fmt: skip


def test_attempts_by_a_server(tmp_path):
    with chat_server(lambda body: {"content": "2"} if "is 1 plus" in asked(body) else 400) as server:
        writer = {"url": server.url, "model": "m", "retries": 0}
        description = {"stage": "difficulty", "models": [{"name": "far", "writer": {"endpoint": writer}}]}
        with pytest.raises(DataError, match="m: 1 of 2 requests failed"):
            run_stage(description, [example(0), example(1)], tmp_path)
        writer["allowed_failures"] = 1.0
        outcome = run_stage(description, [example(0), example(1)], tmp_path)
    assert reasons(outcome) == {0: "no attempt by far", 1: "solved by far"}


class TestLocal:
    PROMPTS = ("the quick", "how many apples are there?", "the quick brown fox", "lazy dog")

    @staticmethod
    def config(folder, **changes):
        return LocalConfig(str(folder), max_new_tokens=6, num_steps=2, batch_size=2, **changes)

    def test_our_model_writes_what_the_engine_writes_alone(self, chat_folder, tmp_path):
        replies = self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(tmp_path / "a.jsonl"))
        model, tokenizer = load_model(chat_folder)
        for prompt, reply in zip(self.PROMPTS, replies, strict=True):
            tokens = tokenizer(prompt)["input_ids"]
            alone = decode(unwrap(model), [tokens], Decoding(max_new_tokens=6, num_steps=2)).tokens[0]
            assert reply.text == tokenizer.decode(alone, skip_special_tokens=True)
            assert (reply.tokens_in, reply.tokens_out, reply.finish) == (len(tokens), 6, "length")

    def test_any_model_of_transformers(self, chat_folder, tmp_path):
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

    def test_stop_texts_end_a_reply(self, chat_folder, tmp_path):
        whole = self.config(chat_folder).open().write(self.PROMPTS[:1], ReplyCache(tmp_path / "a.jsonl"))[0].text
        config = self.config(chat_folder, stop=[whole[3:5]])
        cut = config.open().write(self.PROMPTS[:1], ReplyCache(tmp_path / "b.jsonl"))[0]
        assert (cut.text, cut.finish) == (whole[: whole.find(whole[3:5])], "stop")
        assert config.fingerprint() != self.config(chat_folder).fingerprint()

    def test_a_killed_run_decodes_only_the_batches_it_lacks(self, chat_folder, tmp_path, monkeypatch):
        from recurrent_depth.reasoning.curation.local import LocalWriter

        decoded = []
        original = LocalWriter._decode

        def watched(self, prompts):
            if len(decoded) == 1 and stop:
                raise KeyboardInterrupt
            decoded.append(len(prompts))
            return original(self, prompts)

        monkeypatch.setattr(LocalWriter, "_decode", watched)
        file, stop = tmp_path / "a.jsonl", True
        with pytest.raises(KeyboardInterrupt):
            self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(file))
        stop = False
        resumed = self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(file))
        assert decoded == [2, 2]
        assert resumed == self.config(chat_folder).open().write(self.PROMPTS, ReplyCache(tmp_path / "b.jsonl"))
        assert file.read_bytes() == (tmp_path / "b.jsonl").read_bytes()

    def test_a_stage_with_our_model(self, chat_folder, tmp_path):
        writer = {"model": str(chat_folder), "max_new_tokens": 4, "num_steps": 2}
        models = [{"name": "ours", "writer": {"local": writer}, "prompt": "Q: {question}"}]
        outcome = run_stage({"stage": "difficulty", "models": models}, [example(i) for i in range(3)], tmp_path)
        assert len(outcome.examples) + len(outcome.drops) == 3
        counts = outcome.facts["ours"]
        assert counts["correct"] + counts["wrong"] + counts["undecided"] == 3
        assert len(outcome.examples) == counts["wrong"]


class TestLengths:
    def test_tokens_are_counted_and_limited(self, chat_folder, tmp_path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(chat_folder)
        rows = [example(i, trace="the quick brown fox " * (3 * i + 1)) for i in range(4)]
        expected = [len(tokenizer(row.trace, add_special_tokens=False)["input_ids"]) for row in rows]
        description = {"stage": "lengths", "tokenizer": str(chat_folder)}
        assert [row.trace_tokens for row in run_stage(description, rows, tmp_path).examples] == expected
        limits = {"at_least": expected[1], "at_most": expected[2]}
        outcome = run_stage(description | limits, rows, tmp_path)
        assert ids(outcome.examples) == [1, 2]
        assert reasons(outcome) == {0: "trace too short", 3: "trace too long"}
        assert outcome.drops[1].detail == f"{expected[3]} tokens"

    def test_a_tokenizer_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
            run_stage({"stage": "lengths", "tokenizer": "nothing.json"}, [example()], tmp_path)
