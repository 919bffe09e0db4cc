"""What all parts of Diffusion OPD share. Importing does no I/O; `api`, `roles`, `uris` and `errors` need no torch."""
