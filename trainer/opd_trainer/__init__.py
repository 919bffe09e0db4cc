"""Training, rewards and evaluation."""
