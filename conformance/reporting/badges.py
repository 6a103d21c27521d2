"""Badges: one line about a target, or about one area of it, as a small picture for other pages."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from conformance.results import Verdict

_GREEN, _AMBER, _RED, _GREY, _LABEL = "#1a7f37", "#8a5a00", "#b42318", "#57606a", "#30363d"
_BAD: tuple[Verdict, ...] = ("fail", "xpass", "error", "timeout")
_WIDTH = 7
"""Of a character."""
_MARGIN = 6
_HEIGHT = 20
_SVG = Markup(
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    'role="img" aria-label="{text}">'
    "<title>{text}</title>"
    '<rect width="{split}" height="{height}" fill="{left}"/>'
    '<rect x="{split}" width="{rest}" height="{height}" fill="{right}"/>'
    '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
    '<text x="{margin}" y="14" textLength="{label_length}">{label}</text>'
    '<text x="{at}" y="14" textLength="{message_length}">{message}</text>'
    "</g></svg>\n"
)


def words(counts: Mapping[Verdict, int]) -> tuple[str, str]:
    """What a badge says of results, and its colour.

    Args:
        counts: Number of results by verdict.
    """
    judged = sum(number for verdict, number in counts.items() if verdict != "skip")
    bad = sum(counts.get(verdict, 0) for verdict in _BAD)
    if bad:
        return f"{bad} of {judged} fail", _RED
    if counts.get("inconclusive", 0):
        return f"{counts['inconclusive']} of {judged} inconclusive", _AMBER
    if counts.get("xfail", 0):
        return f"{counts.get('pass', 0)} pass, {counts['xfail']} fail as known", _AMBER
    return (f"{judged} pass", _GREEN) if judged else ("not run", _GREY)


def badge(label: str, counts: Mapping[Verdict, int]) -> str:
    """A badge as SVG, without styles or scripts.

    Args:
        label: What the results are of; any text.
        counts: Number of results by verdict.
    """
    message, colour = words(counts)
    split = _WIDTH * len(label) + 2 * _MARGIN
    rest = _WIDTH * len(message) + 2 * _MARGIN
    return str(
        _SVG.format(
            width=split + rest,
            height=_HEIGHT,
            text=f"{label}: {message}",
            split=split,
            rest=rest,
            left=_LABEL,
            right=colour,
            margin=_MARGIN,
            label=label,
            label_length=_WIDTH * len(label),
            at=split + _MARGIN,
            message=message,
            message_length=_WIDTH * len(message),
        )
    )
