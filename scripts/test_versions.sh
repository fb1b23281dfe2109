#!/usr/bin/env bash
# Run the tests of model/, hf/ and training/ with other versions: test_versions.sh NAME REQUIREMENT...
# The environment is build/NAME. If the packages cannot be had, this is said and nothing is tested.
# With DELETE_ENVIRONMENTS set, it is deleted afterwards.
set -euo pipefail
name=$1
shift
environment=build/$name
if [ ! -f "$environment/.installed" ]; then
    rm -rf "$environment"
    ${PYTHON:-python3} -m venv "$environment"
    if ! "$environment/bin/pip" install --quiet "$@" --editable ".[serve]" hypothesis pytest pytest-xdist; then
        echo "SKIPPED: the packages of \`make $name\` ($*) could not be installed; nothing was tested with them"
        exit 0
    fi
    touch "$environment/.installed"
fi
"$environment/bin/pip" list 2>/dev/null | grep -E "^(torch|triton|transformers|numpy) "
"$environment/bin/python" -m pytest -n 2 -m "not slow and not gpu and not real and not page and not vllm" -p no:cacheprovider \
    tests/model tests/hf tests/training --ignore tests/hf/test_finetuning.py
if [ -n "${DELETE_ENVIRONMENTS:-}" ]; then rm -rf "$environment"; fi
