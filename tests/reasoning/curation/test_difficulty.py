"""Stage `difficulty`: attempts from a file or from a server."""

import json

import pytest

from reasoning.curation.chat_server import asked, chat_server
from reasoning.curation.rows import example, ids, reasons, run_stage
from recurrent_depth.data.layout import DataError


def recorded(folder, name, attempts):
    lines = [json.dumps({"id": f"pool/{number}", "attempt": attempt}) + "\n" for number, attempt in attempts.items()]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"name": name, "recorded": f"{name}.jsonl"}


class TestRecorded:
    def test_difficulty_drops_questions_that_any_model_solves(self, tmp_path):
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

    def test_difficulty_drops_rows_without_recorded_attempt(self, tmp_path):
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

    def test_difficulty_refuses_attempts_at_other_rows(self, tmp_path):
        model = recorded(tmp_path, "small", {7: "1"})
        with pytest.raises(DataError, match=r"no attempt at any of the 2 rows; it has pool/7, the pool has pool/0"):
            run_stage({"stage": "difficulty", "models": [model]}, [example(0), example(1)], tmp_path)

    @pytest.mark.parametrize("line", ['{"id": "pool/0"}', '{"id": 0, "attempt": "1"}', "{"])
    def test_difficulty_error_names_damaged_line_of_attempts(self, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"id": "pool/0", "attempt": "1"}\n' + line + "\n")
        with pytest.raises(DataError, match="line 2"):
            run_stage({"stage": "difficulty", "models": [{"name": "a", "recorded": "a.jsonl"}]}, [example(0)], tmp_path)

    def test_difficulty_error_names_missing_attempts_file(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
            run_stage(
                {"stage": "difficulty", "models": [{"name": "a", "recorded": "nowhere.jsonl"}]}, [example()], tmp_path
            )


def test_difficulty_drops_rows_without_judge_verdict(tmp_path):
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


def test_difficulty_grades_attempts_of_a_server(tmp_path):
    with chat_server(lambda body: {"content": "2"} if "is 1 plus" in asked(body) else 400) as server:
        writer = {"url": server.url, "model": "m", "retries": 0}
        description = {"stage": "difficulty", "models": [{"name": "far", "writer": {"endpoint": writer}}]}
        with pytest.raises(DataError, match="m: 1 of 2 requests failed"):
            run_stage(description, [example(0), example(1)], tmp_path)
        writer["allowed_failures"] = 1.0
        outcome = run_stage(description, [example(0), example(1)], tmp_path)
    assert reasons(outcome) == {0: "no attempt by far", 1: "solved by far"}
