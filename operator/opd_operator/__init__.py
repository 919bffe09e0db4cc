"""The Kubernetes operator of OPDDistillation objects."""
