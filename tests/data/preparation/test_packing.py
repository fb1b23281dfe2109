"""Properties of packing that hold for every token, on random document lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurrent_depth.data.preparation.packing import Packer

documents_of = st.lists(st.integers(1, 40), max_size=30)


def pack(documents, length, policy):
    """Return all rows of the documents, and the packer, which counts the dropped tokens."""
    packer = Packer(length, policy)
    rows = [row for document in documents for row in packer.add(document)]
    return [*rows, *packer.finish()], packer


def numbered(lengths):
    """Return documents whose tokens are all different: document d, token t is 1000 d + t."""
    return [[1000 * d + t for t in range(length)] for d, length in enumerate(lengths)]


@pytest.mark.parametrize("policy", ["concat", "best-fit", "huginn"])
@given(lengths=documents_of, row=st.integers(2, 17))
def test_packing_keeps_each_token_once_or_counts_it_as_dropped(policy, lengths, row):
    rows, packer = pack(numbered(lengths), row, policy)
    kept = [token for r in rows for token in r.input_ids]
    assert all(len(r.input_ids) == row for r in rows)
    assert len(kept) == len(set(kept))
    assert len(kept) + packer.rests + packer.unfilled == sum(lengths)


@pytest.mark.parametrize("policy", ["concat", "best-fit", "huginn"])
@given(lengths=documents_of, row=st.integers(2, 17))
def test_packed_document_starts_mark_first_tokens(policy, lengths, row):
    rows, _ = pack(numbered(lengths), row, policy)
    for r in rows:
        firsts = [place for place, token in enumerate(r.input_ids) if token % 1000 == 0]
        assert r.doc_starts == firsts
        for before, after in zip(r.input_ids, r.input_ids[1:], strict=False):
            assert after == before + 1 or after % 1000 == 0  # documents stay in one piece within a row


@given(lengths=documents_of, row=st.integers(2, 17))
def test_concat_packing_drops_only_last_partial_row(lengths, row):
    _, packer = pack(numbered(lengths), row, "concat")
    assert packer.rests == 0
    assert packer.unfilled == sum(lengths) % row


@given(lengths=documents_of, row=st.integers(2, 17))
def test_huginn_packing_never_continues_a_document_in_next_row(lengths, row):
    rows, _ = pack(numbered(lengths), row, "huginn")
    assert all(r.doc_starts[:1] == [0] for r in rows)
