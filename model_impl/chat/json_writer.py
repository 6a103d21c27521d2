"""JSON text that grows, with the brackets that are open in it."""

from __future__ import annotations

from collections import Counter
from io import StringIO

from model_impl.chat.schema import Node, quote

OPENER_OF = {"}": "{", "]": "[", ")": "("}


class _Frame:
    """An open object or array, under the bracket that closes it in the input."""

    __slots__ = ("closer", "empty", "index", "node")

    def __init__(self, closer: str, node: Node | None) -> None:
        self.closer = closer
        self.node = node
        self.empty = True
        self.index = 0


class JsonWriter:
    """Writes one object, member by member; what is written is never changed.

    Args:
        closer: Bracket that closes the object in the input: `}`, or `)` of the Python-like form.
        node: Schema of the object, or None.
    """

    def __init__(self, closer: str, node: Node | None) -> None:
        self._frames = [_Frame(closer, node)]
        self._open = Counter(closer)
        self._out = StringIO()
        self._out.write("{")

    @property
    def closer(self) -> str:
        """Input bracket that closes the innermost object or array."""
        return self._frames[-1].closer

    @property
    def in_array(self) -> bool:
        """Whether the innermost bracket is an array's."""
        return self.closer == "]"

    @property
    def outermost_closer(self) -> str:
        """Input bracket that closes the whole."""
        return self._frames[0].closer

    @property
    def closers(self) -> list[str]:
        """Input brackets that are still to come, outermost first."""
        return [frame.closer for frame in self._frames]

    @property
    def at_start(self) -> bool:
        """Whether nothing was written but the outermost opening bracket."""
        return len(self._frames) == 1 and self._frames[0].empty

    @property
    def is_closed(self) -> bool:
        """Whether the outermost bracket was closed."""
        return not self._frames

    def take(self) -> str:
        """What was written since the last call."""
        text = self._out.getvalue()
        if text:
            self._out = StringIO()
        return text

    def write(self, json: str) -> None:
        """Append JSON text of, or in, a value."""
        self._out.write(json)

    def start_member(self, key: str) -> None:
        """Begin `"key":` in the innermost object."""
        self._separate()
        self._out.write(quote(key) + ":")

    def start_value(self) -> None:
        """Begin a value: in an array, a new element."""
        if self.in_array:
            self._separate()
            self._frames[-1].index += 1

    def value_node(self, key: str) -> Node | None:
        """Schema of the value about to begin: under `key`, or the array's next element."""
        frame = self._frames[-1]
        if frame.node is None:
            return None
        return frame.node.item(frame.index) if self.in_array else frame.node.property(key)

    def open(self, bracket: str, node: Node | None) -> None:
        """Open an object (`{`) or an array (`[`) as the value begun."""
        self._out.write(bracket)
        frame = _Frame("}" if bracket == "{" else "]", node)
        self._frames.append(frame)
        self._open[frame.closer] += 1

    def rename_closer(self, closer: str) -> None:
        """The outermost object turned out to be closed by another bracket."""
        frame = self._frames[0]
        self._open[frame.closer] -= 1
        self._open[closer] += 1
        frame.closer = closer

    def closes(self, char: str) -> bool:
        """Whether `char` closes the innermost bracket, or one further out whose inner ones were left open.

        A parenthesis closes the innermost bracket only: in text it is too common to mean more.
        """
        return self.closer == ")" if char == ")" else self._open[char] > 0

    def close(self, char: str) -> None:
        """Close brackets up to the one that `char` closes."""
        while True:
            frame = self._frames.pop()
            self._open[frame.closer] -= 1
            self._out.write("]" if frame.closer == "]" else "}")
            if frame.closer == char:
                return

    def close_all(self) -> None:
        """Close what is open."""
        while self._frames:
            self.close(self.closer)

    def _separate(self) -> None:
        if not self._frames[-1].empty:
            self._out.write(",")
        self._frames[-1].empty = False
