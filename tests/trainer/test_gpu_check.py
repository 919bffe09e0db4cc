"""`tools/gpu_check.py` at tiny size, and the page that it writes."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from opd_core.api.training import Precision


def test_it_runs_without_a_card_and_every_check_passes(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "tools" / "gpu_check.py"), "--size", "tiny", "--device", "cpu"]
    done = subprocess.run([*command, "--write", str(tmp_path / "gpu.md")], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"] is True
    assert found["passes"]["to_the_bit"] is True
    assert found["speed"]["images_per_second"] > 0
    assert found["deepspeed"]["installed"] is True
    assert (tmp_path / "gpu.md").read_text() == gpu_check.page(found)
    assert "all checks passed" in gpu_check.page(found)
    assert "a check failed" in gpu_check.page({**found, "ok": False})


def test_a_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    b = gpu_check.bench(gpu_check.SIZES["tiny"], torch.device("cpu"), Precision.FP32)
    ask = b.ask

    def crowded(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return ask(x, sigma) * (1 + 0.1 * (len(x) > 1))  # a kernel that changes with the batch

    monkeypatch.setattr(b, "ask", crowded)
    assert gpu_check.independence(b)["ok"] is False


def test_the_page_says_what_was_run(repository: Path) -> None:
    text = (repository / "docs" / "gpu.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith('    {"card"')]
    assert text == gpu_check.page(json.loads(lines[0]) if lines else None)
