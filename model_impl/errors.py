"""Errors of the reference implementation. Each message says what is wrong, where, and what to do."""


class ModelError(Exception):
    """Base of every error that a user of `model_impl` can cause or meet."""


class ConfigError(ModelError):
    """A configuration lacks something, contradicts itself, or asks for what Gemma 4 does not have."""


class CheckpointError(ModelError):
    """A checkpoint's tensors do not fit its configuration."""


class CacheError(ModelError):
    """A key-value cache does not fit the model or the request."""


class MediaError(ModelError):
    """An image, a video or a sound cannot be used: says which one, why, and what to do."""
