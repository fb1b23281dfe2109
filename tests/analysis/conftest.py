"""Fixtures: an analysis of the small chat model, with what the page says."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from analysed_texts import CONVERGED, STEPS, TEXTS
from recurrent_depth.analysis.command import analyze
from recurrent_depth.analysis.config import AnalyzeConfig
from recurrent_depth.evaluation.table import Result, write_csv


@pytest.fixture(scope="session")
def analysed(chat_folder, tmp_path_factory):
    """The folder of an analysis with everything in it."""
    folder = tmp_path_factory.mktemp("analysis")
    rows = [Result("ours", "validation", "game", "", "parallel", "", None, "accuracy", r, v, 0.01, 64)
            for r, v in ((1, 0.25), (4, 0.5), (8, 0.75))]  # fmt: skip
    rows.append(Result("baseline", "validation", "game", "", "parallel", "", None, "accuracy", 1, 0.4375, 0.01, 64))
    write_csv(rows, folder / "results.csv")
    analyze(AnalyzeConfig(
        model=str(chat_folder), out=str(folder / "out"), text=TEXTS, num_steps=STEPS, converged_steps=CONVERGED,
        exits=["state-change=0.2", "kl=0.01", "entropy=0.02", "argmax=3"], tokens=[0, 3], jacobian=[2],
        jacobian_tokens=2, attention=[1, 4], results=[str(folder / "results.csv")], device="cpu", dtype="float32",
    ))  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="session")
def page(analysed):
    """The data on the page, with its arrays decoded."""
    text = (analysed / "index.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    data["arrays"] = {
        name: np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).reshape(packed["shape"])
        for name, packed in data["arrays"].items()
    }
    return data


@pytest.fixture(scope="session")
def direct(chat_folder):
    """States and logits of every iteration of the second text, by plain calls of the model from the start."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = [model(ids, num_steps=r) for r in [*range(1, STEPS + 1), CONVERGED]]
    return ids[0], [output.last_state[0] for output in outputs], [output.logits[0] for output in outputs]
