"""`analyze` writes what plain calls of the model compute, in arrays, on the page and in the figures."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysed_texts import CONVERGED, STEPS, TEXTS
from recurrent_depth.analysis.config import AnalyzeConfig
from recurrent_depth.analysis.page import PAGE_STEPS, shown_steps
from recurrent_depth.analysis.recording import load
from recurrent_depth.analysis.texts import cut
from recurrent_depth.cli import main


def columns(page):
    """Return the place of the second text in the arrays."""
    window = page["windows"][1]
    return slice(window["first"], window["first"] + window["count"])


def test_page_has_the_states_of_direct_calls(page, direct):
    _, states, _ = direct
    star, here = states[-1], columns(page)
    before = torch.zeros_like(star)
    for row, state in enumerate(states[:-1]):
        change = (state - before).norm(dim=-1) / state.norm(dim=-1)
        distance = (state - star).norm(dim=-1) / star.norm(dim=-1)
        np.testing.assert_allclose(page["arrays"]["relative_change"][row, here], change, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(page["arrays"]["distance"][row, here], distance, rtol=1e-4, atol=1e-5)
        before = state


def test_page_has_the_predictions_of_direct_calls(page, direct):
    ids, _, logits = direct
    here, arrays = columns(page), page["arrays"]
    final = logits[-1].softmax(-1)
    for row, values in enumerate(logits[:-1]):
        p = values.softmax(-1)
        top = p.sort(dim=-1, descending=True).values
        np.testing.assert_allclose(arrays["top_probabilities"][row, here], top[:, :5], rtol=1e-4, atol=1e-7)
        entropy = torch.distributions.Categorical(p).entropy()
        np.testing.assert_allclose(arrays["entropy"][row, here], entropy, rtol=1e-4, atol=1e-6)
        kl = torch.nn.functional.kl_div(p.log(), final, reduction="none").sum(-1)
        np.testing.assert_allclose(arrays["kl"][row, here], kl, rtol=1e-3, atol=1e-6)
    shown = [page["vocabulary"][number] for number in arrays["ids"][here]]
    assert "".join(shown) == TEXTS[1]
    assert len(shown) == len(ids)


def test_coordinates_equal_components_of_scikit_learn(page, chat_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    with torch.no_grad():
        states = torch.stack(
            [torch.cat([model(part, num_steps=r).last_state[0] for part in ids]) for r in range(1, STEPS + 1)]
        ).double()  # [R, N, D]
    theirs = PCA(3, svd_solver="full").fit(states.flatten(0, 1).numpy())
    wanted = theirs.transform(states.flatten(0, 1).numpy()).reshape(page["arrays"]["coordinates"].shape)
    signs = np.sign((wanted * page["arrays"]["coordinates"]).sum((0, 1)))
    np.testing.assert_allclose(page["arrays"]["coordinates"], wanted * signs, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(page["component_shares"], theirs.explained_variance_ratio_, rtol=1e-4)


def test_exits_are_the_first_iterations_at_which_the_rules_hold(page, direct):
    _, states, logits = direct
    states = [torch.zeros_like(states[0]), *states[:STEPS]]
    logp = [values.log_softmax(-1) for values in logits[:STEPS]]
    entropy = [-(p.exp() * p).sum(-1) for p in logp]
    best = torch.stack([p.argmax(-1) for p in logp])  # [R, T]
    holds = {
        "state-change=0.2": [((b - a).norm(dim=-1) / b.norm(dim=-1)) < 0.2 for a, b in pairwise(states)],
        "kl=0.01": [torch.zeros_like(best[0], dtype=bool)]
        + [(q.exp() * (q - p)).sum(-1) < 0.01 for p, q in pairwise(logp)],
        "entropy=0.02": [torch.zeros_like(best[0], dtype=bool)]
        + [(b - a).abs() < 0.02 for a, b in pairwise(entropy)],
        "argmax=3": [
            (best[max(0, r - 2) : r + 1] == best[r]).all(0) & (r >= 2) for r in range(STEPS)
        ],
    }  # fmt: skip
    assert page["exits"] == list(holds)
    for name, row in zip(page["exits"], page["arrays"]["exits"], strict=True):
        table = torch.stack(holds[name])
        first = torch.where(table.any(0), table.int().argmax(0) + 1, 0)
        assert row[columns(page)].tolist() == first.tolist(), name
    final = logits[-1].argmax(-1)
    settled = [next((r + 1 for r in range(STEPS) if (best[r:, t] == final[t]).all()), 0) for t in range(best.shape[1])]
    assert page["arrays"]["settled"][columns(page)].tolist() == settled


def test_arrays_hold_chosen_states_and_paths_from_random_states(analysed, page, direct):
    recording, details = load(analysed)
    assert recording.states.shape == (STEPS, 2, 32)
    np.testing.assert_allclose(recording.norm[:, [0, 3]], np.linalg.norm(recording.states, axis=-1), rtol=1e-5)
    assert recording.path_distance.shape == (2, STEPS, recording.distance.shape[1])
    assert not np.allclose(recording.path_distance[0, 0], recording.path_distance[1, 0])
    assert [row["iteration"] for row in details["jacobian"]] == [2, 2]
    maps = np.load(analysed / "attention" / "window-1-iteration-4.npy")
    tokens = len(details["windows"][1]["ids"])
    assert maps.shape == (1, 1, tokens, tokens)  # one layer and one head
    np.testing.assert_allclose(maps.astype(np.float64).sum(-1), 1, atol=1e-2)
    assert page["results"][3]["shown"] == "43.8"
    assert page["converged_steps"] == CONVERGED


def test_every_figure_has_a_picture_and_its_numbers(analysed):
    folder = analysed / "figures"
    names = {path.stem for path in folder.iterdir()}
    assert names == {
        "convergence",
        "movement",
        "stopping",
        "certainty",
        "paths",
        "path_independence",
        "jacobian",
        "accuracy",
    }
    recording, _ = load(analysed)
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
    with (folder / "convergence.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[-1] == f"iteration {STEPS}"
    np.testing.assert_allclose([[float(v) for v in row[1:]] for row in rows], recording.distance.T, rtol=1e-4)


def test_page_needs_no_network(analysed):
    text = (analysed / "index.html").read_text()
    for start in ('src="', "@import", "url(", "<link"):
        assert start not in text.partition('<script id="data"')[0]
    assert text.count("<script") == 5


def test_long_texts_are_cut_into_windows(capsys):
    windows = cut([("a", range(10)), ("b", range(3))], size=4, max_tokens=11)
    assert [(w.name, w.ids, w.first) for w in windows] == [
        ("a, part 1", [0, 1, 2, 3], 0),
        ("a, part 2", [4, 5, 6, 7], 4),
        ("a, part 3", [8, 9], 8),
        ("b", [0], 10),
    ]
    assert "13 tokens; the first 11" in capsys.readouterr().err


def test_page_shows_at_most_its_iterations():
    assert shown_steps(5) == [1, 2, 3, 4, 5]
    many = shown_steps(128)
    assert len(many) == len(set(many)) == PAGE_STEPS
    assert (many[0], many[-1]) == (1, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --text TEXT or --text-file FILE"),
        (["--text", " "], "text 1 is empty"),
        (["--text-file", "absent.txt"], "absent.txt cannot be read"),
        (["--text", "fox", "--exits", "magic"], "known rules are state-change"),
        (["--text", "fox", "--exits", "kl=x"], "write for example kl=0.001"),
        (["--text", "fox", "--converged-steps", "8"], "converged_steps is 8; it must be at least 64"),
        (["--text", "fox", "--tokens", "99"], r"tokens is [99], but the texts have"),
        (["--text", "fox", "--jacobian", "200"], "at most 128 iterations"),
    ],
)
def test_wrong_options_are_errors_that_leave_nothing(chat_folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["analyze", "--model", str(chat_folder), "--out", str(out), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_analysis_json_lists_the_options(analysed):
    details = json.loads((Path(analysed) / "analysis.json").read_text())
    assert AnalyzeConfig(**details["config"]).num_steps == STEPS
