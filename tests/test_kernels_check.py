"""The compilation check of kernels finds planted faults.

Not in tests/kernels, because it must run without the interpreter.
"""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import check_kernels
import planted_tile
from recurrent_depth_kernels.compilation import Compiled, compile_launch


@pytest.fixture(autouse=True)
def _no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_kernels_check_passes_a_fitting_tile(arch, instruction):
    launch = planted_tile.matrix_product(rows=128, columns=128, inner=32, num_warps=8, stages=2)
    compiled = compile_launch(launch, arch)
    assert compiled.faults() == []
    assert compiled.dots == ((128, "bf16"),)
    assert instruction in compiled.matrix_instructions
    assert compiled.registers > 32


@pytest.mark.parametrize(("arch", "fault"), [("sm_80", "spill"), ("gfx942", "shared memory")])
def test_kernels_check_finds_an_oversized_tile(arch, fault):
    assert any(fault in found for found in compile_launch(planted_tile.matrix_product(), arch).faults())


def test_kernels_check_exits_with_one_on_an_oversized_tile(monkeypatch, capsys, tmp_path):
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["check_kernels.py", "--planted", "--arch", "gfx942", "--out", str(out)])
    assert check_kernels.main() == 1
    assert "multiply(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64) bf16 on gfx942: 98304 bytes" in capsys.readouterr().err
    assert not out.exists()


def test_kernels_check_finds_kernels_that_compile_but_cannot_launch():
    """32 warps of 64 threads; a product that became scalar arithmetic."""
    good = Compiled("gfx942", 64, 0, 0, 512, ((16, "bf16"),), ("v_mfma",), 128)
    assert good.faults() == []
    assert "lower num_warps" in dataclasses.replace(good, threads=2048).faults()[0]
    assert "does not use v_mfma" in dataclasses.replace(good, matrix_instructions=()).faults()[0]
    assert dataclasses.replace(good, spilled=8).faults() == []
    assert "spill" in dataclasses.replace(good, spilled=72).faults()[0]
    few_rows = dataclasses.replace(good, arch="sm_90", matrix_instructions=("mma.sync",))
    assert few_rows.faults() == []  # wgmma takes 64 rows at least
    assert "wgmma" in dataclasses.replace(few_rows, dots=((64, "bf16"),)).faults()[0]


def test_kernels_check_finds_a_kernel_that_does_not_compile(monkeypatch):
    broken = dataclasses.replace(
        planted_tile.matrix_product(), constants={"BLOCK_M": 100, "BLOCK_N": 64, "BLOCK_K": 32}
    )
    monkeypatch.setattr(planted_tile, "matrix_product", lambda: broken)
    check_kernels.launches.cache_clear()
    task = check_kernels.tasks(["sm_90"], planted=True)[0]
    result = check_kernels.run(task)
    check_kernels.launches.cache_clear()
    assert "does not compile" in result
    assert check_kernels.faults({task: result})[0].startswith(task.label)
    assert "**fault**" in check_kernels.table({task: result})
