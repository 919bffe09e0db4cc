"""The teacher service: a Triton model repository, the server that runs it, and its probe."""
