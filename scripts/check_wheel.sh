#!/usr/bin/env bash
# Build the wheel, check its content, install it beside an existing torch, and run it.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --quiet --wheel --no-isolation --outdir "$work" .
wheel=$(ls "$work"/*.whl)
"$python" - "$wheel" <<'CHECK'
import sys, zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
assert tops == {"recurrent_depth", "recurrent_depth_kernels"}, f"the wheel has unexpected top-level packages: {tops}"
for needed in (
    "recurrent_depth/py.typed", "recurrent_depth/evaluation/report.html", "recurrent_depth/configs/model/tiny.yaml",
    "recurrent_depth/analysis/page/page.html", "recurrent_depth/analysis/page/vendor/plot.umd.min.js",
):
    assert needed in names, f"the wheel lacks {needed}"
CHECK

# Heavy dependencies come from the environment that built the wheel; the package itself only from the wheel.
"$python" -m pip install --quiet --no-deps --target "$work/site" "$wheel"
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'CHECK'
import sys

import recurrent_depth

assert "/site/" in recurrent_depth.__file__, recurrent_depth.__file__
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"transformers", "pyarrow", "lm_eval", "triton"}, "import recurrent_depth is not light"

import recurrent_depth_kernels

assert "/site/" in recurrent_depth_kernels.__file__, recurrent_depth_kernels.__file__
CHECK
PYTHONPATH="$work/site" "$python" -m recurrent_depth.cli --help > /dev/null
# The commands of the README work in an empty folder: shipped configurations are found by their path.
mkdir "$work/empty" && cd "$work/empty"
PYTHONPATH="$work/site" "$python" -m recurrent_depth.cli train --config configs/pretrain/quickstart/shell-game.yaml \
  --dry-run | grep "name: shell_game" > /dev/null
echo "wheel ok: $(basename "$wheel")"
