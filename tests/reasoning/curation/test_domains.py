"""Stage `domains`: labels from clustering, from a model and from the source."""

import json

import pytest

from reasoning.curation.chat_server import asked, chat_server
from reasoning.curation.rows import example, ids, reasons, run_stage
from recurrent_depth.data.layout import DataError

TRAINS = "The train goes at {} miles an hour for {} hours; what distance in miles does the train cover?"
APPLES = "A farmer picks {} apples and sells {} apples at the market; how many apples are left to the farmer?"
PAGES = "Anna reads {} pages of a book on Monday and {} pages on Friday; how many pages of the book did Anna read?"


class TestDomains:
    ROWS = tuple(example(i, question=(TRAINS, APPLES, PAGES)[i % 3].format(i + 2, 3 * i + 5)) for i in range(30))

    def test_domain_clusters_match_topics_and_are_named_by_topic_words(self, tmp_path):
        (tmp_path / "test.jsonl").write_text(json.dumps({"question": TRAINS.format(1, 2)}) + "\n")
        labeller = {"clusters": {"count": 3, "components": 4, "terms": 4}}
        description = {"stage": "domains", "labeller": labeller, "benchmark": [{"path": "test.jsonl"}]}
        outcome = run_stage(description, list(self.ROWS), tmp_path, seed=1)
        by_topic = [{row.domain for row in outcome.examples[topic::3]} for topic in range(3)]
        assert [len(names) for names in by_topic] == [1, 1, 1]
        trains, apples, pages = (names.pop() for names in by_topic)
        for name, words in ((trains, "train"), (apples, "apples"), (pages, "pages")):
            assert words in name
        assert outcome.facts["domains"] == {trains: 10, apples: 10, pages: 10}
        assert outcome.facts["benchmark"] == {trains: 1}
        again = run_stage(description, list(self.ROWS), tmp_path, seed=1)
        assert again.examples == outcome.examples

    def test_domain_clustering_refuses_more_clusters_than_rows(self, tmp_path):
        with pytest.raises(DataError, match="30 rows cannot form 31 clusters"):
            run_stage({"stage": "domains", "labeller": {"clusters": {"count": 31}}}, list(self.ROWS), tmp_path)

    def test_domain_clustering_refuses_questions_without_common_words(self, tmp_path):
        rows = [example(i, question=f"{i} + 1?") for i in range(4)]
        with pytest.raises(DataError, match="too few words"):
            run_stage({"stage": "domains", "labeller": {"clusters": {"count": 2}}}, rows, tmp_path)

    def test_domains_stage_keeps_source_labels(self, tmp_path):
        rows = [example(0, domain="algebra"), example(1), example(2, domain="algebra")]
        outcome = run_stage({"stage": "domains"}, rows, tmp_path)
        assert ids(outcome.examples) == [0, 2]
        assert reasons(outcome) == {1: "no domain"}
        assert outcome.facts == {"domains": {"algebra": 2}}

    def test_domains_stage_uses_model_labels(self, tmp_path):
        answers = {0: "Algebra", 1: "**geometry**.", 2: "Cooking", 3: 500}

        def name(body):
            assert "algebra\ngeometry" in asked(body)
            answer = next(answers[i] for i in answers if f"is {i} plus" in asked(body))
            return answer if isinstance(answer, int) else {"content": answer}

        with chat_server(name) as server:
            writer = {"url": server.url, "model": "m", "retries": 0, "allowed_failures": 0.3}
            labeller = {"model": {"names": ["algebra", "geometry"], "writer": {"endpoint": writer}}}
            outcome = run_stage({"stage": "domains", "labeller": labeller}, [example(i) for i in range(4)], tmp_path)
        assert [row.domain for row in outcome.examples] == ["algebra", "geometry"]
        assert reasons(outcome) == {2: "no domain", 3: "no domain"}
