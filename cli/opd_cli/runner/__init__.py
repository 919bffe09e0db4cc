"""A whole distillation as processes of this machine: the operator's stages without a cluster."""
