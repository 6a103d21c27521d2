"""The states of the argument reader."""

from __future__ import annotations

from enum import Enum, auto


class Phase(Enum):
    """What the reader is in the middle of."""

    KEY = auto()
    """A bare key, up to its separator."""
    DELIMITED_KEY = auto()
    """A key between string delimiters."""
    KEY_END = auto()
    """After a delimited key, before its separator."""
    KEY_OR_STRING = auto()
    """After `key<Q>`: the delimiter closes the key, or opens a value whose `:` is missing."""
    VALUE = auto()
    """Before the first character of a value."""
    STRING = auto()
    """Between string delimiters."""
    QUOTED = auto()
    """After an ASCII quote that opened a value; everything since is kept, in case none closes it."""
    QUOTE_END = auto()
    """After an ASCII quote that closes the value if a separator follows."""
    BARE = auto()
    """A value without delimiters."""
    NEXT = auto()
    """After `bare value,`: the next key, or more of the value."""
    AFTER = auto()
    """After a value that is complete."""
    WRAPPED = auto()
    """After the inner `}` of `({…})` or `{{…}}`: the outer bracket is still open."""
    DONE = auto()
    """The call's closing bracket was read."""
