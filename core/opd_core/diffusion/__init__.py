"""Schedules, transitions, guidance and noise of rectified-flow models: pure functions, no I/O.

Rectified flow: x = (1 - s) x0 + s e, v = e - x0, sigma s runs from 1 (noise) to 0 (image).
"""
