"""`OPDDistillation`: the one object a user writes. Pydantic and the standard library only."""
