"""Loading a text-to-image model, its adapters and its identity."""
