"""train/log.jsonl: one line per round, and the same numbers for TensorBoard on request."""

import json
from pathlib import Path
from typing import Any

from opd_core.errors import InvalidError, StorageError

from opd_trainer.record import RoundRecord


class RoundLog:
    """Appends to `directory`/log.jsonl. Lines after round `start` are dropped: those rounds will be played again."""

    def __init__(self, directory: Path, start: int, tensorboard: bool = False) -> None:
        self._path = directory / "log.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _keep_until(self._path, start)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}") from error
        self._board = _summary_writer(directory / "tensorboard", start) if tensorboard else None

    def write(self, record: RoundRecord, time: str) -> None:
        try:
            self._file.write(json.dumps({"time": time, **record.line()}) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}; free some space and start again") from error
        if self._board is not None:
            for tag, value in _scalars(record).items():
                self._board.add_scalar(tag, value, record.round)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: Path, start: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["round"] <= start:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # the line that a killed process was writing
    scratch = path.with_name(f".{path.name}")
    scratch.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    scratch.replace(path)


def _summary_writer(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidError("--tensorboard needs a package; in the checkout: pip install '.[tensorboard]'") from error
    return SummaryWriter(str(directory), purge_step=start + 1)


def _scalars(record: RoundRecord) -> dict[str, float]:
    values = {"loss": record.loss, "grad_norm": record.grad_norm, "learning_rate": record.learning_rate}
    values["images_per_second"] = record.images_per_second
    values.update({f"seconds/{phase}": seconds for phase, seconds in record.phases.items()})
    for name, task in record.tasks.items():
        values.update({f"loss/{name}": task.loss, f"velocity_mse/{name}": task.velocity_mse})
        if task.kl is not None:
            values[f"kl/{name}"] = task.kl
    values.update({f"policy/{figure}": value for figure, value in record.figures.items()})
    for name, rewards in record.rewards.items():
        values.update({f"reward/{name}/{reward}": mean for reward, mean in rewards.items()})
    return values
