"""Base, teachers and student on the same held-out prompts with the same noise; intervals; the gate."""

from pathlib import Path

VALIDATION_PROMPTS = 16  # per task, at most: what is scored while training goes on; the evaluation's first ones
LOOK_IMAGES = 4  # of them, at most: whose images are kept


def looks_of(work: Path) -> Path:
    """Where a run keeps the images of its looks, ROUND/TASK/NUMBER.png, or .webp of videos."""
    return work / "train" / "looks"
