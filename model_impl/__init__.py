"""Gemma 4 in plain PyTorch, with its chat format. Never imports `conformance`."""
