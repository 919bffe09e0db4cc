"""All of them. The first one's autoencoder, prompts and reader are everyone's."""

from .sd3 import SD3

WORLDS = (SD3,)
