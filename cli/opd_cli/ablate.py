"""`opd ablate`: one spec with some fields changed, run after run, and a table of what they came to."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from opd_core.api.load import SpecError, load_spec, spec_digest
from opd_core.api.types import OPDDistillation
from opd_core.errors import InvalidError, OPDError
from opd_core.exit_codes import ExitCode

from opd_cli.ablation.grid import Cell, cells, read_grid
from opd_cli.ablation.results import (
    Result,
    as_csv,
    as_figure,
    as_json,
    as_markdown,
    known_results,
    read_result,
)
from opd_cli.ablation.scores import copy_scores
from opd_cli.runner.display import clock
from opd_cli.terminal import echo

_FINISHED = (ExitCode.OK, ExitCode.GATE)  # a student that missed its gate is a result, too


def ablate(
    file: Annotated[Path, typer.Argument(metavar="GRID", help="The grid, YAML: spec, set, grid, seeds.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder of all runs. Default: runs/NAME of the grid's file.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, which share the threads.")] = 1,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Folder behind a pvc:// claim; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to use in all; default: every core this process may use.")
    ] = None,
) -> None:
    """Run a spec once for every combination of some fields' values and every seed, up to the evaluation, and write
    WORK/results.md (means over seeds with 95 % intervals, the best first), results.csv (a row a run), results.svg and
    results.json.

    Runs that results.json has are not repeated: the same command goes on after Ctrl-C, a failure or with more values in
    the grid, and on another machine that is given this file.
    With evaluation.everyRounds the table says after how many student forwards 0.98 of every teacher's gain is kept.

    Example: opd ablate examples/tiny/ablation.yaml --jobs 2
    """
    grid = read_grid(file)
    spec_file, folder = file.parent / grid.spec, (work or Path("runs", file.stem)).resolve()
    found = [(cell, _checked(cell, spec_file)) for cell in cells(grid)]
    share = max(1, (threads or len(os.sched_getaffinity(0))) // jobs)
    options = [f"--device={device}", f"--threads={share}", *(f"--claim={each}" for each in claim or [])]
    runs = Runs(spec_file, folder, options, found)
    with runs.listening(), ThreadPoolExecutor(jobs) as pool:
        ends = list(pool.map(lambda item: runs.play(*item), found))
    results = [result for result in ends if isinstance(result, Result)]
    failed = [end for end in ends if isinstance(end, str)]
    if results:
        echo(f"\n{as_markdown(results)}\n{folder / 'results.md'}")
    if runs.stopped.is_set():
        echo(f"stopped with {len(results)} of {len(found)} runs finished; the same command goes on", err=True)
        raise typer.Exit(int(ExitCode.INTERRUPTED))
    if failed:
        raise OPDError("\n".join([f"{len(failed)} of {len(found)} runs failed:", *failed]))


def _checked(cell: Cell, spec_file: Path) -> OPDDistillation:
    """The cell's spec, before any run begins."""
    try:
        return load_spec(spec_file, list(cell.changes))
    except SpecError as error:
        raise InvalidError(f"with {cell.words}: {error}") from error


class Runs:
    """Starts `opd run` for cells, and passes a stop signal on to those that are at work."""

    def __init__(
        self, spec_file: Path, folder: Path, options: Sequence[str], grid: Sequence[tuple[Cell, OPDDistillation]]
    ) -> None:
        self.stopped = threading.Event()
        self._spec_file, self._folder, self._options = spec_file, folder, options
        self._scores = folder / "base-and-teachers"
        self._working: set[subprocess.Popen[bytes]] = set()
        self._writing = threading.Lock()
        known = known_results(folder / "results.json")
        digests = {cell.name: spec_digest(distillation) for cell, distillation in grid}
        # Another grid may call the same run another name.
        self._ends = {
            cell.name: replace(known[digests[cell.name]], cell=cell) if digests[cell.name] in known else None
            for cell, _ in grid
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM reach the runs at work: once they save a checkpoint, twice they end at once."""

        def pass_on(number: int, _: FrameType | None) -> None:
            self.stopped.set()
            for program in list(self._working):
                program.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def play(self, cell: Cell, distillation: OPDDistillation) -> Result | str | None:
        """The cell's result; why it failed; None where it was stopped."""
        work = self._folder / "cells" / cell.name
        result = self._ends[cell.name]
        if result is None:
            if self.stopped.is_set():
                return None
            echo(f"{clock()}  {cell.words}, seed {cell.seed}: {work}")
            copy_scores(self._scores, work / "evaluation")
            code = self._run(cell, work)
            if self.stopped.is_set() and code not in _FINISHED:
                return None
            if code not in _FINISHED:
                return f"  {cell.words}, seed {cell.seed}: code {code}, {work.with_suffix('.txt')} says why"
            copy_scores(work / "evaluation", self._scores)
            result = read_result(cell, distillation.spec, work)
        self._keep(result)
        kept = "none" if result.mean_kept is None else f"{result.mean_kept:.2f}"
        echo(f"{clock()}  {cell.words}, seed {cell.seed}: kept {kept} in {result.seconds:.0f} s of rounds")
        return result

    def _keep(self, result: Result) -> None:
        """In every file at once: what is finished is never run again."""
        with self._writing:
            self._ends[result.cell.name] = result
            results = [end for end in self._ends.values() if end]
            texts = {
                "md": as_markdown(results),
                "csv": as_csv(results),
                "svg": as_figure(results),
                "json": as_json(results),
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            for suffix, text in texts.items():
                if text:
                    scratch = self._folder / f".results.{suffix}"
                    scratch.write_text(text)
                    scratch.replace(self._folder / f"results.{suffix}")

    def _run(self, cell: Cell, work: Path) -> int:
        work.parent.mkdir(parents=True, exist_ok=True)
        run = [sys.executable, "-m", "opd_cli.main", "run", str(self._spec_file), f"--work={work}", "--until=evaluated"]
        command = [*run, *self._options, *(f"--set={change}" for change in cell.changes)]
        with work.with_suffix(".txt").open("ab") as output:
            program = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            self._working.add(program)
            code = program.wait()
            self._working.discard(program)
        return code
