"""Many runs of one spec with some fields changed, and what they came to."""
