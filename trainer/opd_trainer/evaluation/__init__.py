"""Base, teachers and student on the same held-out prompts with the same noise; intervals; the gate."""

VALIDATION_PROMPTS = 16  # per task, at most: what is scored while training goes on; the evaluation's first ones
