"""`opd`: the command line, and the runner for one machine."""
