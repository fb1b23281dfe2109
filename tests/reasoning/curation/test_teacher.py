"""Stage `teacher` with a local HTTP server: traces, costs, concurrency, failures and restart."""

import json
import time

import pytest

from reasoning.curation.chat_server import asked, chat_server
from reasoning.curation.rows import example, ids, reasons, run_stage
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.curation.endpoint import EndpointConfig
from recurrent_depth.reasoning.curation.replies import Reply, ReplyCache


def lacking(count):
    return [example(i, trace="") for i in range(count)]


def stage(url, **options):
    writer = {"url": url, "model": "teacher", "retries": 0, **options.pop("writer", {})}
    return {"stage": "teacher", "writer": {"endpoint": writer}, "prompt": "Solve: {question}", **options}


WRITER = {"system": "Be brief", "max_tokens": 77, "temperature": None, "extra": {"reasoning_effort": "high"}}


def thoughtful(body):
    return {"content": f"<think>\nI read: {asked(body)}\n</think>\n\nIt is 1."}


def test_teacher_writes_traces_for_rows_without_one(tmp_path):
    rows = [example(0), *lacking(3)[1:]]
    with chat_server(thoughtful) as server:
        options = {"prices": {"tokens_in": 2.0, "tokens_out": 10.0}, "writer": WRITER}
        outcome = run_stage(stage(server.url, **options), rows, tmp_path)
        sent = sorted(server.requests, key=asked)
    assert outcome.examples[0] == rows[0]
    assert [row.trace for row in outcome.examples[1:]] == [
        "I read: Solve: What is 1 plus 1?", "I read: Solve: What is 2 plus 1?",
    ]  # fmt: skip
    assert {row.trace_answer for row in outcome.examples[1:]} == {"It is 1."}
    assert [asked(body) for body in sent] == ["Solve: What is 1 plus 1?", "Solve: What is 2 plus 1?"]
    assert sent[0]["messages"][0] == {"role": "system", "content": "Be brief"}
    assert (sent[0]["model"], sent[0]["max_tokens"], sent[0]["seed"]) == ("teacher", 77, 0)
    assert "temperature" not in sent[0]
    assert sent[0]["reasoning_effort"] == "high"
    words_in, words_out = 2 * (2 + 6), 2 * (1 + 8 + 1 + 3)
    assert outcome.facts == {
        "requests": 2, "failed": 0, "tokens in": words_in, "tokens out": words_out,
        "cost": pytest.approx((2 * words_in + 10 * words_out) / 1e6),
    }  # fmt: skip


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_teacher_reads_trace_from_reasoning_field(tmp_path, field):
    with chat_server(lambda body: {"content": "42", field: "Long thoughts."}) as server:
        row = run_stage(stage(server.url), lacking(1), tmp_path).examples[0]
    assert (row.trace, row.trace_answer) == ("Long thoughts.", "42")


def test_teacher_drops_reply_cut_at_token_limit(tmp_path):
    with chat_server(lambda body: {"content": "<think> and", "finish_reason": "length"}) as server:
        outcome = run_stage(stage(server.url), lacking(1), tmp_path)
    assert reasons(outcome) == {0: "teacher cut at its limit"}


def test_endpoint_sends_requests_at_given_concurrency(tmp_path):
    def slow(body):
        time.sleep(0.1)
        return {"content": "ok"}

    with chat_server(slow) as server:
        run_stage(stage(server.url, writer={"concurrency": 3}), lacking(9), tmp_path)
        assert server.most_at_once == 3


class TestServerFailures:
    @staticmethod
    def fails_for(*numbers):
        def answer(body):
            return 500 if any(f"is {n} plus" in asked(body) for n in numbers) else {"content": "t </think> a"}

        return answer

    def test_teacher_rerun_requests_only_missing_replies(self, tmp_path):
        with chat_server(self.fails_for(1, 3)) as server:
            with pytest.raises(DataError, match=r"2 of 5 requests failed.*status 500.*run the command again"):
                run_stage(stage(server.url), lacking(5), tmp_path)
            assert len(server.requests) == 5
            server.requests.clear()
            server.answer = self.fails_for()
            outcome = run_stage(stage(server.url), lacking(5), tmp_path)
            assert sorted(map(asked, server.requests)) == ["Solve: What is 1 plus 1?", "Solve: What is 3 plus 1?"]
        assert ids(outcome.examples) == [0, 1, 2, 3, 4]
        assert outcome.facts["requests"] == 5

    def test_teacher_drops_and_counts_allowed_failures(self, tmp_path):
        with chat_server(self.fails_for(1)) as server:
            outcome = run_stage(stage(server.url, writer={"allowed_failures": 0.2}), lacking(5), tmp_path)
        assert reasons(outcome) == {1: "teacher failed"}
        assert outcome.facts["failed"] == 1

    def test_endpoint_retries_temporary_failures(self, tmp_path):
        failed = []

        def once(body):
            failed.append(1)
            return 503 if len(failed) == 1 else {"content": "ok"}

        with chat_server(once) as server:
            assert len(run_stage(stage(server.url, writer={"retries": 1}), lacking(1), tmp_path).examples) == 1

    def test_endpoint_stops_requests_after_repeated_failures(self, tmp_path):
        with chat_server(lambda body: 401) as server:
            options = {"writer": {"give_up_after": 4, "concurrency": 1}}
            with pytest.raises(DataError, match="50 of 50 requests failed"):
                run_stage(stage(server.url, **options), lacking(50), tmp_path)
            assert len(server.requests) == 4

    def test_endpoint_counts_malformed_response_as_failure(self, tmp_path):
        with (
            chat_server(lambda body: {}) as server,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(server, "reply", lambda body: (200, {"hello": "world"}))
            with pytest.raises(DataError, match="1 of 1 requests failed"):
                run_stage(stage(server.url), lacking(1), tmp_path)

    def test_endpoint_reports_unreachable_server(self, tmp_path):
        with chat_server(thoughtful) as server:
            url = server.url
        with pytest.raises(DataError, match=r"requests failed.*Connection"):
            run_stage(stage(url), lacking(1), tmp_path)


class TestReplyCache:
    def test_reply_cache_removes_unfinished_last_line(self, tmp_path):
        file = tmp_path / "a.jsonl"
        ReplyCache(file).put({"k1": Reply("one"), "k2": Reply("zwei é\nthree")})
        whole = file.read_bytes()
        for size in range(len(whole)):
            file.write_bytes(whole[:size])
            cache = ReplyCache(file)
            cache.put({"k3": Reply("four")})
            again = ReplyCache(file)
            assert again.get("k3") == Reply("four")
            assert len(again.replies) == 1 + whole[:size].count(b"\n")

    def test_reply_cache_error_names_damaged_line(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"key": "a"}\n' + json.dumps({"key": "b", "text": "t"}) + "\n")
        with pytest.raises(DataError, match="line 1 is damaged"):
            ReplyCache(tmp_path / "a.jsonl")

    def test_endpoint_fingerprint_depends_only_on_request(self):
        base = EndpointConfig("http://a/v1", "m")
        assert base.fingerprint() == EndpointConfig("http://b/v1", "m", concurrency=2, timeout_s=1.0).fingerprint()
        changes = {"model": "n", "system": "s", "max_tokens": 5, "temperature": 0.5, "seed": 1, "extra": {"a": 1}}
        for name, value in changes.items():
            changed = EndpointConfig(**({"url": "http://a/v1", "model": "m"} | {name: value}))
            assert changed.fingerprint() != base.fingerprint()


def test_teacher_refuses_prompt_without_question(tmp_path):
    with pytest.raises(ValueError, match=r"lacks \{question\}"):
        run_stage(stage("http://localhost", prompt="Go"), lacking(1), tmp_path)


def test_teacher_prompt_keeps_latex_braces(tmp_path):
    row = example(0, trace="", question=r"Simplify \frac{1}{2} and {answer}, {question}.")
    with chat_server(thoughtful) as server:
        run_stage(stage(server.url), [row], tmp_path)
        assert asked(server.requests[0]) == "Solve: " + row.question
