"""The image endpoint: OpenAI's Images API over a step-batching engine."""
