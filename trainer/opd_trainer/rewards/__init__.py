"""Rewards: how good an image is for its prompt. More is better."""
