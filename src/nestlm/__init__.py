"""Nested language models: one set of weights, many sub-networks, any budget."""
