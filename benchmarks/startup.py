"""What a pod waits for before it does anything: importing its libraries, as we do it and with collections as usual.

python benchmarks/startup.py: seconds of a process that imports a role's program and ends, the least of three, side by
side. "as usual": garbage is collected while modules come, and the interpreter takes everything apart at the end.
"""

import subprocess
import sys
import time

ROLES = {
    "trainer": "opd_trainer.train",
    "evaluator": "opd_trainer.evaluate",
    "endpoint": "opd_serving.endpoint.server",
}
_AS_USUAL = "import contextlib, opd_core.imports as ours; ours.without_collection = contextlib.nullcontext; import {}"
_OURS = "import {}; from opd_core.process import leave; leave(0)"


def seconds(program: str) -> float:
    began = time.perf_counter()
    # Remarks of libraries at the end of the process are not of interest here, a failure is.
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def main() -> None:
    print(f"{'role':10} {'as usual':>9} {'ours':>6}  ratio")
    for role, modules in ROLES.items():
        pairs = [(seconds(_AS_USUAL.format(modules)), seconds(_OURS.format(modules))) for _ in range(3)]
        usual, ours = (min(column) for column in zip(*pairs, strict=True))
        print(f"{role:10} {usual:7.2f} s {ours:4.2f} s  {usual / ours:.2f}", flush=True)


if __name__ == "__main__":
    main()
