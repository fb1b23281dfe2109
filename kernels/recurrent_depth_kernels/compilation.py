"""Compile a launch for a GPU that is not present, and report what would fail on it.

Needs a process without TRITON_INTERPRET. The numbers are from the assemblers: `cuobjdump -res-usage` of the cubin for
NVIDIA, the metadata of the amdgcn text for AMD.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.targets import is_hip, warp_size

SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "gfx90a": 64 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024,
}  # fmt: skip
"""Bytes of shared memory (LDS) that a program may use, by the guides of the vendors."""

MAX_THREADS = 1024

TOLERATED_SPILL = 16
"""Bytes per thread: assemblers spill a register or two outside the loop even far below the limit."""

_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \* ")
_MATRIX = re.compile(r"\b(wgmma|mma\.sync|tcgen05\.mma|v_mfma)")
_LOADS = re.compile(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)|(?:global|buffer)_load_(?:dwordx(\d)|b(\d+)|dword\b|u?short)")


@dataclass(frozen=True)
class Compiled:
    """Resources and instructions of a compiled launch.

    Attributes:
        registers: vector registers per thread (AMD: with accumulation registers).
        shared: bytes of shared memory per program.
        spilled: bytes of local memory per thread, used by spilled registers.
        threads: threads per program.
        dots: (rows, dtype) of every matrix product in the source.
        matrix_instructions: families of matrix instructions in the result.
        load_bits: width of the widest load from memory, in bits.
    """

    arch: str
    registers: int
    shared: int
    spilled: int
    threads: int
    dots: tuple[tuple[int, str], ...]
    matrix_instructions: tuple[str, ...]
    load_bits: int

    def faults(self) -> list[str]:
        """Return the reasons why this would not launch, or would run far below the speed of the GPU."""
        found = []
        if self.threads > MAX_THREADS:
            found.append(f"{self.threads} threads are more than {MAX_THREADS}: lower num_warps")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory exceed {SHARED_LIMIT[self.arch]}: use a smaller tile")
        if self.spilled > TOLERATED_SPILL:
            found.append(f"{self.spilled} bytes of registers spill per thread: use a smaller tile or more warps")
        wanted = self._wanted_instruction()
        if wanted is not None and wanted not in self.matrix_instructions:
            found.append(f"a matrix product of {self.dots[0]} does not use {wanted}")
        return found

    def _wanted_instruction(self) -> str | None:
        """Return the matrix instruction that a product must use. Full-precision fp32 products have one only on AMD."""
        if not self.dots:
            return None
        if is_hip(self.arch):
            return "v_mfma"
        rows, dtype = self.dots[0]
        if dtype in ("f32", "f64"):
            return None
        return {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(self.arch, "mma.sync") if rows >= 64 else "mma.sync"


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile a launch for `arch` (see `targets.ARCHITECTURES`) as it would be compiled on that GPU."""
    backend = "hip" if is_hip(arch) else "cuda"
    source = ASTSource(
        launch.kernel, launch.signature(), constexprs=launch.constexprs(), attrs=launch.attributes(backend)
    )
    target = GPUTarget(backend, arch if is_hip(arch) else int(arch.removeprefix("sm_")), warp_size(arch))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    assembly = compiled.asm["amdgcn" if is_hip(arch) else "ptx"]
    registers, spilled = _amd_usage(assembly) if is_hip(arch) else _nvidia_usage(compiled.asm["cubin"])
    return Compiled(
        arch=arch,
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=spilled,
        threads=compiled.metadata.num_warps * warp_size(arch),
        dots=tuple((int(rows), dtype) for rows, dtype in _DOT.findall(compiled.asm["ttir"])),
        matrix_instructions=tuple(sorted(set(_MATRIX.findall(assembly)))),
        load_bits=max((_bits(found) for found in _LOADS.finditer(assembly)), default=0),
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of stack and local memory)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Return (vector registers, bytes of scratch memory). A spilled register without scratch counts as four bytes."""
    used = {name: int(value) for name, value in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", assembly)}
    return used["vgpr_count"], max(used["private_segment_fixed_size"], 4 * used["vgpr_spill_count"])


def _bits(found: re.Match[str]) -> int:
    vector, size, words, bits = found.groups()
    if size:
        return int(size) * int(vector or 1)
    return int(bits) if bits else 32 * int(words or 1)
