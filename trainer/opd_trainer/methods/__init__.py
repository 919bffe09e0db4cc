"""How a student is trained: one method a file, each a sequence of matches for one batch of a round."""
