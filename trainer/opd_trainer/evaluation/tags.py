"""GenEval's own score: the mean of its six tasks' means, not the mean over images, of which some tasks have more."""

from collections.abc import Mapping, Sequence

from opd_trainer.prompt_files import PromptRecord

MEANS_BY_TAG = ("geneval",)  # rewards whose authors average so

Tags = Mapping[str, Sequence[str]]  # task -> [N], of its images; empty where a prompt has none


def tags_of(records: Sequence[PromptRecord]) -> list[str]:
    """`tag` of each record, as "counting" or "position"; none at all where one has none."""
    tags = [record.metadata.get("tag") for record in records]
    return [tag for tag in tags if isinstance(tag, str)] if all(isinstance(tag, str) for tag in tags) else []


def tags_for(reward: str, task: str, tags: Tags) -> Sequence[str]:
    """By which tags the mean of a reward is taken; empty: over all images alike."""
    return tags.get(task, ()) if reward in MEANS_BY_TAG else ()
