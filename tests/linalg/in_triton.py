"""The kernels in a process of their own: Triton asks once whether to interpret them.

Usage: in_triton.py run|compile FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from repscope import eigvalsh
from repscope.linalg.routes import tridiagonal, triton


def run(folder: Path) -> None:
    """Save what the kernels make of each batch in matrices.pt."""
    matrices = torch.load(folder / "matrices.pt")
    found = {name: triton.launch(C) for name, C in matrices.items()}
    public = eigvalsh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), backend="triton")
    torch.save((found, public), folder / "found.pt")


def compile_for_cuda(folder: Path) -> None:
    """Save the PTX of each kernel and what ptxas says it takes on an sm_90."""
    from triton import compile as compiled
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from repscope.linalg.routes import triton_kernels

    results = {}
    for dtype, letters in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        for n in (32, 64, 128):
            block, options = triton.tile(n, dtype)
            constants = {
                "ZERO": tridiagonal.floor(dtype),
                "TINY": torch.finfo(dtype).tiny,
                "STEPS": tridiagonal.steps(dtype),
                "BLOCK": block,
            }
            for kernel in (triton_kernels.tridiagonalise, triton_kernels.bisect):
                names = kernel.arg_names
                pointers = dict.fromkeys(names, f"*{letters}")
                own = {name: constants[name] for name in names if name in constants}
                source = ASTSource(
                    kernel,
                    pointers | {"n": "i32"} | dict.fromkeys(own, "constexpr"),
                    own,
                )
                if kernel is triton_kernels.bisect:
                    options = {"num_warps": block // 32, "enable_fp_fusion": True}
                done = compiled(source, GPUTarget("cuda", 90, 32), options)
                results[f"{kernel.__name__} {letters} {n}"] = (
                    done.asm["ptx"],
                    resources(done.asm["cubin"], knobs.nvidia.cuobjdump.path, folder),
                )
    torch.save(results, folder / "compiled.pt")


def resources(cubin: bytes, cuobjdump: str, folder: Path) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [cuobjdump, "--dump-resource-usage", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    {"run": run, "compile": compile_for_cuda}[sys.argv[1]](Path(sys.argv[2]))
