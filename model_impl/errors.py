"""Errors of the reference implementation. Each message says what is wrong, where, and what to do."""


class ModelError(Exception):
    """Base of every error that a user of `model_impl` can cause or meet."""
