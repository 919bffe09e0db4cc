"""What a pod waits for before it does anything: importing its libraries.

python benchmarks/startup.py: seconds of a process that imports a role's program and ends, the least of three, side by
side.

    uncompiled   no bytecode anywhere, as where uv has installed it and PYTHONDONTWRITEBYTECODE is set
    as usual     garbage is collected while modules come, the interpreter takes everything apart at the end, and what
                 prepares a teacher server on a CPU imports PyTorch
    ours         what the programs do
"""

import os
import subprocess
import sys
import time

ROLES = {
    "teachers": ("torch, opd_serving.teacher.prepare", "opd_serving.teacher.prepare"),
    "trainer": ("opd_trainer.train", "opd_trainer.train"),
    "evaluator": ("opd_trainer.evaluate", "opd_trainer.evaluate"),
    "endpoint": ("opd_serving.endpoint.server", "opd_serving.endpoint.server"),
}
_AS_USUAL = "import contextlib, opd_core.imports as ours; ours.without_collection = contextlib.nullcontext; import {}"
_OURS = "import {}; from opd_core.process import leave; leave(0)"
_UNCOMPILED = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": os.devnull}


def seconds(program: str, **env: str) -> float:
    began = time.perf_counter()
    # Remarks of libraries at the end of the process are not of interest here, a failure is.
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=os.environ | env
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def main() -> None:
    print(f"{'role':10} {'uncompiled':>11} {'as usual':>9} {'ours':>7}   ratios")
    for role, (usual, ours) in ROLES.items():
        programs = _AS_USUAL.format(usual), _OURS.format(ours)
        rows = [(seconds(programs[0], **_UNCOMPILED), *map(seconds, programs)) for _ in range(3)]
        slowest, slow, fast = (min(column) for column in zip(*rows, strict=True))
        ratios = f"{slowest / fast:.2f} {slow / fast:.2f}"
        print(f"{role:10} {slowest:9.2f} s {slow:7.2f} s {fast:5.2f} s   {ratios}", flush=True)


if __name__ == "__main__":
    main()
