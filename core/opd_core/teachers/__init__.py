"""Asking frozen teachers for velocities: the contract, the client, and the engine that answers.

A query is rows. Each row names its teacher, its state, its noise level, its guidance and, by digest, its prompt, so one
batch may mix all of them.
"""
