"""Text of models and engines, made safe and visible.

Everything here is untrusted. `plain` is applied to every string that a template prints. `visible`
draws a stretch of model text: markers become chips, whitespace gets signs, and characters that
cannot be seen, or that would reorder what follows, are named. The signs are drawn by the style
sheet, so copied text is the original except for the named characters.
"""

from __future__ import annotations

import regex
from markupsafe import Markup, escape

_MARKER = r'<\|"\|>|<\|[a-z_]{1,24}\|?>|<[a-z_]{1,24}\|>|<(?:bos|eos|pad|unk|mask)>|<unused\d{1,5}>'
_UNSEEN = r"[\p{Cf}\p{Cs}\p{Zl}\p{Zp}\uFDD0-\uFDEF]|[^\P{Cc}\n\t]|[\p{Cn}&&[\p{Noncharacter_Code_Point}]]"
_ODD_SPACE = r"[\p{Zs}--[ ]]"

MARKER = regex.compile(_MARKER, regex.V1)
"""A Gemma 4 marker, or a text of the same shape (`<|tool_call|>` is a known confusion)."""

_UNSEEN_RE = regex.compile(_UNSEEN, regex.V1)
_PARTS = regex.compile(
    rf"(?P<marker>{_MARKER})|(?P<unseen>{_UNSEEN}|{_ODD_SPACE})|(?P<newline>\n)|(?P<tab>\t)|(?P<spaces>[ ]+)",
    regex.V1,
)

_WHITESPACE = ("newline", "tab", "spaces")
_CODE = regex.compile(r"`([^`\n]+)`")

_LABELS = {
    "<|channel>": "thought channel opens",
    "<channel|>": "thought channel closes",
    "<|tool_call>": "tool call opens",
    "<tool_call|>": "tool call closes",
    "<|tool_response>": "tool response opens",
    "<tool_response|>": "tool response closes",
    "<|tool>": "tool declaration opens",
    "<tool|>": "tool declaration closes",
    "<|turn>": "turn opens",
    "<turn|>": "turn closes",
    "<|think|>": "thinking is on",
    '<|"|>': "string delimiter",
    "<bos>": "begin of sequence",
    "<eos>": "end of sequence",
    "<pad>": "padding",
}

LONG_TEXT = 4_000
"""Characters above which a text is folded away behind its beginning."""
HUGE_TEXT = 200_000
"""Characters above which the middle of a text is left out of the page."""


# fmt: off
_CONTROLS = (
    "NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "HT", "LF", "VT", "FF", "CR", "SO", "SI",
    "DLE", "DC1", "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB", "ESC", "FS", "GS", "RS", "US",
)
# fmt: on


def name_of(char: str) -> str:
    """What stands in for a character that cannot be shown: a control's name, or its code point."""
    code = ord(char)
    if code < len(_CONTROLS):
        return _CONTROLS[code]
    return "DEL" if code == 0x7F else f"U+{code:04X}"


def plain(text: str) -> str:
    """A string in which every unseen character is replaced by its name. Not yet escaped."""
    # `isprintable` is false for everything unseen, and much quicker.
    return text if text.isprintable() else _UNSEEN_RE.sub(lambda m: f"[{name_of(m[0])}]", text)


def prose(text: str) -> Markup:
    """A sentence for people, with `names in backticks` set as code."""
    parts = _CODE.split(plain(text))
    out = Markup()
    for number, part in enumerate(parts):
        out += Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
    return out


def visible(
    text: str, *, signs: bool = True, starts: bool = True, ends: bool = True, every_space: bool = False
) -> Markup:
    """Model text as HTML for an element with `white-space: pre-wrap`.

    Args:
        text: Any string, lone surrogates included.
        signs: Give whitespace signs. Without, the whitespace is the harness's own, as in indented JSON.
        starts: The text begins a line, so its leading spaces get signs.
        ends: The text ends there, so its trailing spaces get signs.
        every_space: Give each space a sign, also single ones between words.
    """
    out: list[str] = []
    at = 0
    for match in _PARTS.finditer(text):
        out.append(str(escape(text[at : match.start()])))
        at = match.end()
        if match.lastgroup in _WHITESPACE and not signs:
            out.append(match[0])
        else:
            out.append(_part(match, text, starts=starts, ends=ends, every_space=every_space))
    out.append(str(escape(text[at:])))
    return Markup("".join(out))  # noqa: S704  # every piece was escaped above or is built by `_part`


def _part(match: regex.Match[str], text: str, *, starts: bool, ends: bool, every_space: bool) -> str:
    piece = match[0]
    if match["marker"] is not None:
        return _chip(piece)
    if match["unseen"] is not None:
        return f'<span class="unseen" title="U+{ord(piece):04X}">{name_of(piece)}</span>'
    if match["newline"] is not None:
        return '<span class="nl"></span>\n'
    if match["tab"] is not None:
        return '<span class="tab">\t</span>'
    before, after = match.start(), match.end()
    leading = text[before - 1] == "\n" if before else starts
    trailing = text[after] == "\n" if after < len(text) else ends
    if leading or trailing or every_space or len(piece) > 1:
        return '<span class="sp"> </span>' * len(piece)
    return piece


def _chip(marker: str) -> str:
    label = _LABELS.get(marker, "marker")
    if marker.startswith("<|") and not marker.endswith("|>"):
        kind = "open"
    elif marker.endswith("|>") and not marker.startswith("<|"):
        kind = "close"
    else:
        kind = "lone"
    return f'<span class="mk mk-{kind}" title="{label}">{escape(marker)}</span>'


def shorten(text: str, limit: int = HUGE_TEXT) -> tuple[str, int]:
    """The text with its middle cut out where it is too long, and the number of characters left out."""
    if len(text) <= limit:
        return text, 0
    tail = limit // 10
    left_out = len(text) - limit
    return f"{text[: limit - tail]}\n[… {left_out} characters left out …]\n{text[-tail:]}", left_out
