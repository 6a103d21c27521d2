"""How a server is named, `openai@URL#MODEL`, and where its key comes from. Nothing is sent here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from conformance.errors import TargetError
from conformance.fingerprint import redact

NAME = "openai"
KEY_SETTING = "CONFORMANCE_KEY_VARIABLE"
"""Variable that may name the one which holds the key."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""Variable that holds the key, unless another is named."""

_SHORTEST_KEY = 8
_KEY = re.compile(r"[\x21-\x7e]+")
_FORM = f"{NAME}@http://127.0.0.1:8000/v1#MODEL"


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL."""

    url: str
    """Up to the version, without a slash at its end: `http://127.0.0.1:8000/v1`."""
    model: str

    @property
    def spec(self) -> str:
        """How the target is named."""
        return f"{NAME}@{self.url}#{self.model}"


def is_endpoint(spec: str) -> bool:
    """Whether a spec names a server."""
    return spec == NAME or spec.startswith(f"{NAME}@")


def endpoint(spec: str) -> Endpoint:
    """Read a spec.

    Raises:
        TargetError: it has no URL or no model, or the URL holds what it must not.
    """
    address, _, model = spec.removeprefix(NAME).removeprefix("@").partition("#")
    return checked_endpoint(address, model)


def checked_endpoint(url: str, model: str) -> Endpoint:
    """An endpoint whose parts make sense.

    Raises:
        TargetError: as `endpoint`.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"{redact(url)!r} is no URL: {error}; write {_FORM}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise TargetError(f"{redact(url)!r} is no http or https URL; a server is named {_FORM}")
    if parts.username is not None or parts.password is not None:
        raise TargetError(
            f"{redact(url)} carries a user name; leave it out, and put a key in an environment variable"
        )
    if parts.query or parts.fragment:
        raise TargetError(f"{parts.scheme}://{host}: leave out what follows the path; {_FORM}")
    if not model or re.search(r"\s", url + model):
        raise TargetError(f"{redact(url)}: the model's name is missing, or holds blanks; {_FORM}")
    return Endpoint(url.rstrip("/"), model)


def key_of(variable: str | None = None) -> str:
    """The key, or an empty text where none is set.

    Args:
        variable: The one that was asked for by name; it must then be set.

    Raises:
        TargetError: it is not set, or holds what no header can.
    """
    asked = variable or os.environ.get(KEY_SETTING)
    name = asked or KEY_VARIABLE
    key = os.environ.get(name, "")
    if not key:
        if asked:
            raise TargetError(f"the environment variable {name} is not set; it should hold the server's key")
        return ""
    if not _KEY.fullmatch(key):
        raise TargetError(f"{name} holds blanks or characters beyond ASCII; that is no key")
    if len(key) < _SHORTEST_KEY:
        raise TargetError(
            f"{name} holds less than {_SHORTEST_KEY} characters, too few to keep it out of the evidence; "
            "unset it if the server needs no key"
        )
    return key
