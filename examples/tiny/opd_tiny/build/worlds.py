"""All of them. The first one's autoencoder, prompts and reader are everyone's."""

from .sd3 import SD3

WORLDS = (SD3,)  # klein.py's joins them with its weights, which are not trained yet
