"""The exceptions that this library raises on purpose.

    MTPDecodeError
    ├── UnsupportedModelError (also ValueError)     no family matches, or the target has something that we cannot do exactly
    ├── CheckpointError       (also OSError)        a file or folder is absent, truncated or unreadable
    ├── HeadWeightsError      (also ValueError)     checkpoint and family disagree: names missing, surplus and misshapen tensors
    ├── CacheError            (also RuntimeError)   capacity, unknown layer type, commit out of range
    └── GenerationError       (also ValueError)     an input or an option that we do not honour

Every message has three parts: what was asked, what was found, what to type instead.
"""

from __future__ import annotations


class MTPDecodeError(Exception):
    """The base of every exception that `mtpdecode` raises on purpose."""


class UnsupportedModelError(MTPDecodeError, ValueError):
    """No known family of heads matches the model, or the model has a part that cannot be decoded exactly."""


class CheckpointError(MTPDecodeError, OSError):
    """A checkpoint's file or folder is absent, truncated or unreadable."""


class HeadWeightsError(MTPDecodeError, ValueError):
    """The tensors of a checkpoint are not those that the family's head needs."""


class CacheError(MTPDecodeError, RuntimeError):
    """A cache was asked for more slots than it has, for an unknown layer type, or to keep tokens that were never written."""


class GenerationError(MTPDecodeError, ValueError):
    """An input or an option of `generate` that is wrong or that this library does not honour."""
