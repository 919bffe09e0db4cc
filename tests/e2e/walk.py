"""The commands of a page, run as they stand."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

_FIRST_WORDS = ("kubectl", "helm", "opd", "curl")
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """Lines of one language: sh or python."""

    heading: str
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """Commands and Python of a page, without what its author excepts by `<!-- not run: why -->`."""
    heading, lines, skip = "", page.splitlines(), False
    while lines:
        line = lines.pop(0)
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif _NOT_RUN.fullmatch(line.strip()):
            skip = True
        elif line.startswith("```"):
            body = []
            while not lines[0].startswith("```"):
                body.append(lines.pop(0))
            lines.pop(0)
            if line == "```python" and not skip:
                yield Block(heading, "python", "\n".join(body))
            skip = False
        elif line.startswith("    "):
            body = [line[4:]]
            while lines and lines[0].startswith("    "):
                body.append(lines.pop(0)[4:])
            if body[0].split()[0] in _FIRST_WORDS and not skip:
                yield Block(heading, "sh", "\n".join(body))
            skip = False


@dataclass
class Walker:
    """Runs blocks in `folder`, a copy of what the pages name; NAME in them is `name`."""

    folder: Path
    kubeconfig: Path
    path: str
    name: str

    def run(self, page: Path, *, after: str = "", before: str = "") -> int:
        """The blocks of a page from the heading `after` up to the heading `before`. Returns how many."""
        text = page.read_text()
        for heading in filter(None, (after, before)):
            assert f"\n## {heading}\n" in text, f"{page.name} has no heading {heading}"
        text = text.partition(f"\n## {after}\n")[2] if after else text
        found = list(blocks(text.partition(f"\n## {before}\n")[0] if before else text))
        with ExitStack() as stack:
            for block in found:
                self._run(page, block, stack)
        return len(found)

    def _run(self, page: Path, block: Block, stack: ExitStack) -> None:
        text = re.sub(r"\bNAME\b", self.name, block.text)
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.path}:{os.environ['PATH']}"}
        command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [sys.executable, "-c", text]
        if "port-forward" in text:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.folder, env=env, stdout=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            _wait_for_port(int(re.findall(r"(\d+):\d+", text)[0]))
            return
        done = subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, f"{page.name}, {block.heading}:\n{text}\n{done.stdout}{done.stderr}"


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nobody listens on {port}"
        time.sleep(0.2)
