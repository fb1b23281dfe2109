"""`plan --measured`: days of a run from measured training steps, beside the closed form."""

import json
import re
from pathlib import Path

import pytest

from recurrent_depth.cli import main
from support import error_line

RUN = ["plan", "--run", "pretrain/huginn-3.5b-h100.yaml", "--num-gpus", "128"]


def row(shape="huginn-3.5b", variant="triton, compiled", hfu: float | None = 0.5, **changes):
    fields = {"rows": 1, "tokens": 4096, "depth": [24, 8], "recompute": "step", "seconds": 1.5, "mfu": 0.4}
    return {"shape": shape, "variant": variant, "hfu": hfu} | fields | changes


def write(path, *rows, gpu="NVIDIA H100 80GB HBM3"):
    path.write_text(json.dumps({"environment": {"gpu": gpu}, "entries": dict(enumerate(rows))}))
    return str(path)


def table(capsys):
    """Return the cells of the time table by the name of the row, and the text."""
    text = capsys.readouterr().out
    return {name: cells for name, *cells in (re.split(r" \| ", line.strip("| ")) for line in text.splitlines())}, text


def test_plan_predicts_days_from_the_best_measured_step_of_the_nearest_shape(tmp_path, capsys):
    steps = [
        row(hfu=0.31, variant="eager"), row(hfu=0.5, recompute="block"), row(hfu=0.45), row("small", hfu=0.6),
        {"shape": "huginn-3.5b", "variant": "eager", "error": "out of memory"}, row(hfu=None),
    ]  # fmt: skip
    assert main([*RUN, "--utilisation", "0.25", "--measured", write(tmp_path / "training.json", *steps)]) == 0
    cells, text = table(capsys)
    assert (
        "huginn-3.5b, triton, compiled, 1 x 4096 tokens, n = 24, k = 8, recomputation block, on NVIDIA H100 80GB HBM3: "
        "HFU 50.0%" in text
    )
    assert cells["time"] == ["assumed: 25% of the peak", "measured: 50.0% of the peak"]
    assumed, measured = (float(cell.removesuffix(" s")) for cell in cells["compute per training step"])
    assert measured == pytest.approx(assumed / 2, rel=1e-3)
    assert "is not h100" not in text
    assert main([*RUN, "--utilisation", "0.5"]) == 0
    assert table(capsys)[0]["days of the run"] == cells["days of the run"][1:]


def test_plan_takes_the_share_of_the_peak_from_another_gpu_and_says_so(tmp_path, capsys):
    path = write(tmp_path / "training.json", row("tiny", hfu=0.1), row("small", hfu=0.2))
    assert main([*RUN, "--device", "mi300x", "--measured", path]) == 0
    cells, text = table(capsys)
    assert cells["time"][1] == "measured: 20.0% of the peak"  # small is nearer to the 3.5B model than tiny
    assert "NVIDIA H100 80GB HBM3 is not mi300x; the same share of the peak is taken for both" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"), ("[]", "indices"), ('{"entries": {}}', "no field 'environment'"),
        ({"environment": {"gpu": "x"}, "entries": {"a": row("huge")}}, "shape is 'huge'; known are tiny"),
        ({"environment": {"gpu": "x"}, "entries": {"a": row(hfu=40.0)}}, "hfu is 40.0"),
        ({"environment": {"gpu": "x"}, "entries": {"a": {"hfu": 0.5, "shape": "tiny"}}}, "no field 'depth'"),
        ({"environment": {"gpu": "x"}, "entries": {"a": row(hfu=None)}}, "no training step with an HFU"),
    ],
)  # fmt: skip
def test_plan_refuses_a_wrong_measurement_file(tmp_path, capsys, content, reason):
    path = tmp_path / "training.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main([*RUN, "--measured", str(path)]) == 1
    message = error_line(capsys)
    assert f"measured: {path}" in message
    assert reason in message
    assert "leave measured out" in message


def test_plan_refuses_a_missing_measurement_file(tmp_path, capsys):
    assert main([*RUN, "--measured", str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in error_line(capsys)


def test_plan_takes_the_best_step_that_was_measured_on_an_h200(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / "training.json"
    best = max(entry["hfu"] for entry in json.loads(path.read_text())["entries"].values())
    assert main([*RUN, "--device", "h200", "--measured", str(path)]) == 0
    assert f"on NVIDIA H200: HFU {best:.1%}" in capsys.readouterr().out
