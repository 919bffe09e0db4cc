"""The tiny world: captioned 32x32 scenes of handwritten digits, and three rewards that need no large model."""
