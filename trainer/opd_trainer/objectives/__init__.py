"""What a student is trained on: one file per kind of loss, each a function of a `Match`."""
