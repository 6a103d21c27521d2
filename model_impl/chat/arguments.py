"""Incremental reader of tool-call arguments: Gemma 4's notation in, JSON text out.

Grammar: fact sheet section 6.4; what is done with malformed text: `docs/parsing.md`, section 4.

The reader is one automaton with an explicit stack, so nesting costs no recursion and the whole costs
linear time. JSON is emitted as soon as no later text can change it; hence every prefix of what was
emitted is a prefix of the final JSON.
"""

from __future__ import annotations

import re
from io import StringIO

from model_impl.chat.argument_phases import Phase
from model_impl.chat.delimited import DelimitedText
from model_impl.chat.json_writer import OPENER_OF, JsonWriter
from model_impl.chat.keys import KeyText
from model_impl.chat.quoted import QUOTED_STOP, QuotedText, Run
from model_impl.chat.schema import Node, type_bare, type_quoted
from model_impl.chat.spans import Role, SpanLog

_KEY_STOP = re.compile(r"[:=,{}\[\])]")
_BARE_STOP = re.compile(r"[,{}\[\]()]")
_NEXT_STOP = re.compile(r"[:=,{}\[\]()]")
_AFTER_STOP = re.compile(r"[:=,}\])]")
_BLANK = re.compile(r"\s*")
_CLOSERS = "}])"


class ArgumentReader:
    """Reads the arguments of one call, from after its opening bracket to its closing one.

    Args:
        opener: `{`, or `(` of the Python-like form.
        node: Schema of the parameters object, or None.
        log: Told what became of every character, in order.
        plain_quotes: ASCII quotes that are known not to close, and therefore to be text.
    """

    def __init__(
        self, opener: str, node: Node | None, log: SpanLog, plain_quotes: frozenset[str] = frozenset()
    ) -> None:
        self._log = log
        self._json = JsonWriter("}" if opener == "{" else ")", node)
        self._wrapper = ""
        self._phase = Phase.KEY
        self._key = KeyText()
        self._bare = StringIO()
        self._next = KeyText()
        self._segment = StringIO()
        self._brackets: list[str] = []
        self._string = DelimitedText(None)
        self._quoted = QuotedText('"')
        self.plain_quotes = plain_quotes

    # ------------------------------------------------------------------ interface

    @property
    def done(self) -> bool:
        """Whether the call's closing bracket was read."""
        return self._phase is Phase.DONE

    @property
    def in_string(self) -> bool:
        """Whether marker text would be part of a delimited string or key."""
        return self._phase in (Phase.STRING, Phase.DELIMITED_KEY)

    @property
    def may_end_here(self) -> bool:
        """Inside a string: whether the text so far ends like a call whose string was never closed."""
        closer = self._wrapper or self._json.outermost_closer
        return self._phase is Phase.STRING and self._string.ends_with(closer)

    def take(self) -> str:
        """JSON text that became certain since the last call."""
        return self._json.take()

    def feed(self, text: str, position: int = 0) -> int:
        """Read text without delimiters from `position`; return where it stopped (the end, unless done)."""
        while position < len(text) and self._phase is not Phase.DONE:
            position = _STEPS[self._phase](self, text, position)
        return position

    def delimiter(self, width: int) -> list[Run]:
        """Read one string delimiter of `width` characters.

        Returns:
            What turned out to lie behind the call's end (a quote that never closed was read again);
            when that happens the delimiter is not used.
        """
        if self._phase is Phase.QUOTED:
            rest = self._read_again()
            if self.done:
                return rest
        self.plain_quotes = frozenset()
        self._settle_open_quote()
        role: Role = "marker"
        reason = ""
        match self._phase:
            case Phase.KEY if not self._key.blank:
                self._key = KeyText(self._key.name())
                self._segment = StringIO()
                self._phase = Phase.KEY_OR_STRING
            case Phase.KEY_OR_STRING:
                self._open_missed_string()
                self._close_string()
            case Phase.KEY:
                self._key = KeyText()
                self._phase = Phase.DELIMITED_KEY
            case Phase.DELIMITED_KEY:
                self._phase = Phase.KEY_END
            case Phase.VALUE:
                self._open_string()
            case Phase.STRING:
                self._close_string()
            case Phase.QUOTE_END:
                self._finish_quoted()
                role, reason = "dropped", "delimiter after a quoted value"
            case Phase.BARE:
                self._finish_bare(delimited=True)
            case Phase.NEXT if not self._next.blank:
                self._join_next()
                self._finish_bare(delimited=True)
            case Phase.NEXT:
                self._finish_bare()
                self._key = KeyText()
                self._phase = Phase.DELIMITED_KEY
            case _:
                self._settle_after(keep=False)
                role, reason = "dropped", "delimiter out of place"
        self._log.add(role, width, reason)
        return []

    def stray(self, marker: str) -> None:
        """Read a marker that neither delimits nor ends anything, outside a string."""
        if self._phase is Phase.QUOTE_END:
            self._quote_goes_on()
        if self._phase is Phase.QUOTED:
            self._quoted.add_marker(marker)
            return
        self._settle_after(keep=False)
        self._log.add("dropped", len(marker), "marker inside arguments")

    def end(self) -> list[Run]:
        """The call is over, whatever is open: complete the JSON.

        Returns:
            What turned out to lie behind the call's closing bracket.
        """
        if self._phase is Phase.QUOTED:
            rest = self._read_again()
            if self.done:
                return rest
        self._settle_open_quote()
        closed = False
        match self._phase:
            case Phase.STRING:
                closed = self._close_unclosed_string()
            case Phase.QUOTE_END:
                self._finish_quoted()
            case Phase.BARE:
                self._finish_bare()
            case Phase.NEXT:
                self._end_of_next()
            case Phase.VALUE:
                self._empty_value()
            case Phase.KEY:
                self._valueless_key()
            case Phase.DELIMITED_KEY | Phase.KEY_END | Phase.KEY_OR_STRING:
                self._empty_member(self._key.raw())
            case Phase.WRAPPED:
                closed = True
        self._settle_after(keep=False)
        self._json.close_all()
        if closed:
            self._phase = Phase.DONE
        return []

    # ------------------------------------------------------------------ keys

    def _read_key(self, text: str, position: int) -> int:
        match = _KEY_STOP.search(text, position)
        stop = match.start() if match else len(text)
        self._key.add(text[position:stop])
        self._used(position, stop)
        if match is None:
            return stop
        char = match.group()
        if self._separates(char):
            if not self._key.hold(char):
                self._start_member(self._key.name())
        elif self._settle_open_quote():
            return stop
        elif char == ",":
            self._valueless_key()
        elif char in _CLOSERS:
            if self._json.closes(char):
                self._valueless_key()
                return self._close(char, stop)
            if self._key.blank:
                self._log.add("dropped", 1, "unbalanced closing bracket")
                return stop + 1
            self._key.add(char)
        elif char == "{" and self._key.blank and self._json.at_start and not self._wrapper:
            self._wrapper = self._json.closer
            self._json.rename_closer("}")
        else:
            self._key.add(char)
        return self._used(stop, stop + 1)

    def _settle_open_quote(self) -> bool:
        """If a key's quote never closed, its first `:` was the separator after all: begin that member."""
        key = {Phase.KEY: self._key, Phase.NEXT: self._next}.get(self._phase)
        parts = key.split() if key is not None else None
        if parts is None:
            return False
        if self._phase is Phase.NEXT:
            self._finish_bare()
        self._start_member(parts[0])
        if parts[1].strip():
            self._begin_bare(parts[1])
        return True

    def _separates(self, char: str) -> bool:
        """`:` ends a key; so does `=` directly inside parentheses."""
        return char == ":" or (char == "=" and self._json.closer == ")")

    def _read_delimited_key(self, text: str, position: int) -> int:
        self._key.add(text[position:])
        return self._used(position, len(text))

    def _read_key_end(self, text: str, position: int) -> int:
        end = _blank_end(text, position)
        self._used(position, end)
        if end == len(text):
            return end
        char = text[end]
        if self._separates(char):
            self._start_member(self._key.raw())
            return self._used(end, end + 1)
        if char == "," or (char in _CLOSERS and self._json.closes(char)):
            self._empty_member(self._key.raw())
            return end
        self._log.add("dropped", 1, "text after a delimited key")
        return end + 1

    def _read_key_or_string(self, text: str, position: int) -> int:
        """`key<Q>`: before a separator the key lost its opener; before other text the `:` is missing."""
        end = _blank_end(text, position)
        self._segment.write(text[position:end])
        self._used(position, end)
        if end < len(text):
            if self._separates(text[end]) or text[end] in _CLOSERS + ",":
                self._phase = Phase.KEY_END
            else:
                self._open_missed_string()
        return end

    def _open_missed_string(self) -> None:
        self._start_member(self._key.raw())
        blanks = self._segment.getvalue()
        self._open_string()
        self._string.add_blanks(blanks)

    def _start_member(self, key: str) -> None:
        self._json.start_member(key)
        self._key = KeyText(key)
        self._phase = Phase.VALUE

    def _empty_member(self, key: str) -> None:
        self._start_member(key)
        self._json.write('""')
        self._end_value()

    def _valueless_key(self) -> None:
        """A key without separator: kept, with an empty value, so that its text is not lost."""
        if not self._key.blank:
            self._empty_member(self._key.name())
        self._begin_key()

    # ------------------------------------------------------------------ values

    def _read_value(self, text: str, position: int) -> int:
        start = _blank_end(text, position)
        self._used(position, start)
        if start == len(text):
            return start
        char = text[start]
        if char in "{[":
            node = self._value_node()
            self._json.start_value()
            self._json.open(char, node)
            self._begin_item()
        elif char in QUOTED_STOP and char not in self.plain_quotes:
            self._quoted = QuotedText(char)
            self._phase = Phase.QUOTED
            return start + 1  # recorded when it is known whether the quote closes
        elif char == ",":
            self._empty_value()
            self._begin_item()
        elif char in _CLOSERS and self._json.closes(char):
            self._empty_value()
            return self._close(char, start)
        else:
            self._begin_bare()
            return start
        return self._used(start, start + 1)

    def _empty_value(self) -> None:
        """`key:` without a value is an empty string; an empty array element is nothing."""
        if not self._json.in_array:
            self._json.write('""')

    def _value_node(self) -> Node | None:
        return self._json.value_node(self._key.raw())

    def _begin_key(self) -> None:
        self._key = KeyText()
        self._phase = Phase.KEY

    def _begin_item(self) -> None:
        """After an opening bracket or a comma: the next key, or the next element."""
        if self._json.in_array:
            self._phase = Phase.VALUE
        else:
            self._begin_key()

    def _end_value(self) -> None:
        self._segment = StringIO()
        self._phase = Phase.AFTER

    # ------------------------------------------------------------------ delimited strings

    def _open_string(self) -> None:
        self._string = DelimitedText(self._value_node())
        if self._string.live:
            self._json.start_value()
            self._json.write('"')
        self._phase = Phase.STRING

    def _read_string(self, text: str, position: int) -> int:
        self._json.write(self._string.add(text[position:]))
        return self._used(position, len(text))

    def _close_string(self) -> None:
        if not self._string.live:
            self._json.start_value()
        self._json.write(self._string.close())
        self._end_value()

    def _close_unclosed_string(self) -> bool:
        """Give the brackets at the end of an unclosed string back to the call; True if all were there."""
        complete = self._string.give_back((*self._wrapper, *self._json.closers))
        self._close_string()
        return complete

    # ------------------------------------------------------------------ quoted strings

    def _read_quoted(self, text: str, position: int) -> int:
        position, at_quote = self._quoted.read(text, position)
        if at_quote:
            self._phase = Phase.QUOTE_END
        return position

    def _read_quote_end(self, text: str, position: int) -> int:
        end = _blank_end(text, position)
        self._quoted.add_blanks(text[position:end])
        if end == len(text):
            return end
        char = text[end]
        if char == "," or (char in _CLOSERS and self._json.closes(char)):
            self._finish_quoted()
            return end
        self._quote_goes_on()
        return end

    def _quote_goes_on(self) -> None:
        self._quoted.go_on()
        self._phase = Phase.QUOTED

    def _finish_quoted(self) -> None:
        self._log.add("call_arguments", self._quoted.length, "")
        node = self._value_node()
        self._json.start_value()
        self._json.write(type_quoted(self._quoted.value(), node))
        self._end_value()

    def _read_again(self) -> list[Run]:
        """No quote closed the value: read it again as a bare one; return what lies behind the call's end."""
        runs = self._quoted.runs()
        self.plain_quotes |= {self._quoted.quote}
        self._begin_bare()
        for number, (text, is_marker) in enumerate(runs):
            if is_marker:
                self.stray(text)
                continue
            used = self.feed(text)
            if self.done:
                return [(text[used:], False), *runs[number + 1 :]]
        # The other kind of quote may have opened inside, and not have closed either.
        return self._read_again() if self._phase is Phase.QUOTED else []

    # ------------------------------------------------------------------ bare values

    def _begin_bare(self, text: str = "") -> None:
        self._bare = StringIO()
        self._bare.write(text)
        self._brackets = []
        self._phase = Phase.BARE

    def _read_bare(self, text: str, position: int) -> int:
        match = _BARE_STOP.search(text, position)
        stop = match.start() if match else len(text)
        self._bare.write(text[position:stop])
        self._used(position, stop)
        if match is None:
            return stop
        char = match.group()
        if self._is_text(char):
            self._bare.write(char)
        elif char != ",":
            self._finish_bare()
            return self._close(char, stop)
        elif self._json.in_array:
            self._finish_bare()
            self._begin_item()
        else:
            self._next = KeyText()
            self._phase = Phase.NEXT
        return self._used(stop, stop + 1)

    def _read_next(self, text: str, position: int) -> int:
        match = _NEXT_STOP.search(text, position)
        stop = match.start() if match else len(text)
        self._next.add(text[position:stop])
        self._used(position, stop)
        if match is None:
            return stop
        char = match.group()
        if self._separates(char):
            if not self._next.hold(char):
                key = self._next.name()
                self._finish_bare()
                self._start_member(key)
        elif self._settle_open_quote():
            return stop
        elif self._is_text(char):
            self._next.add(char)
        elif char == ",":
            if not self._next.blank:
                self._join_next()
            self._next = KeyText()
        else:
            self._end_of_next()
            return self._close(char, stop)
        return self._used(stop, stop + 1)

    def _is_text(self, char: str) -> bool:
        """Whether a bracket is part of a bare value: it opens, it matches one, or it closes nothing."""
        if char in "{[(":
            if char != "(" or self._json.closer == ")":
                self._brackets.append(char)
            return True
        if char in _CLOSERS:
            if self._brackets and self._brackets[-1] == OPENER_OF[char]:
                self._brackets.pop()
                return True
            return not self._json.closes(char)
        return char != ","

    def _join_next(self) -> None:
        """The text after the comma has no `:`, so the comma belongs to the value."""
        self._bare.write("," + self._next.raw())

    def _end_of_next(self) -> None:
        if not self._next.blank:
            self._join_next()
        self._finish_bare()

    def _finish_bare(self, *, delimited: bool = False) -> None:
        node = self._value_node()
        lexeme = self._bare.getvalue().strip()
        self._json.start_value()
        self._json.write(type_quoted(lexeme, node) if delimited else type_bare(lexeme, node))
        self._end_value()

    # ------------------------------------------------------------------ after values

    def _read_after(self, text: str, position: int) -> int:
        match = _AFTER_STOP.search(text, position)
        stop = match.start() if match else len(text)
        self._segment.write(text[position:stop])
        if match is None:
            return stop
        char = match.group()
        if char in _CLOSERS and self._json.closes(char):
            self._settle_after(keep=False)
            return self._close(char, stop)
        if char == ",":
            self._settle_after(keep=False)
            self._begin_item()
        elif not self._json.in_array and self._separates(char) and (key := self._segment.getvalue()).strip():
            self._settle_after(keep=True)  # the comma is missing, the next key is not
            self._start_member(KeyText(key).name())
        else:
            self._segment.write(char)
            return stop + 1
        return self._used(stop, stop + 1)

    def _settle_after(self, *, keep: bool) -> None:
        """Record the text since the last value: a key, blanks, or text that belongs nowhere."""
        if self._phase is not Phase.AFTER:
            return
        text = self._segment.getvalue()
        self._segment = StringIO()
        if text:
            if keep or text.isspace():
                self._log.add("call_arguments", len(text), "")
            else:
                self._log.add("dropped", len(text), "text after a closed value")

    # ------------------------------------------------------------------ brackets

    def _close(self, char: str, position: int) -> int:
        """Close brackets up to the one that `char`, at `position`, closes."""
        self._json.close(char)
        self._end_value()
        if not self._json.is_closed:
            return self._used(position, position + 1)
        self._phase = Phase.WRAPPED if self._wrapper else Phase.DONE
        self._log.add("marker" if self.done else "call_arguments", 1, "")
        return position + 1

    def _read_wrapped(self, text: str, position: int) -> int:
        end = _blank_end(text, position)
        self._used(position, end)
        if end == len(text):
            return end
        self._phase = Phase.DONE
        if text[end] != self._wrapper:
            return end
        self._log.add("marker", 1, "")
        return end + 1

    def _used(self, start: int, end: int) -> int:
        if end > start:
            self._log.add("call_arguments", end - start, "")
        return end


_STEPS = {
    Phase.KEY: ArgumentReader._read_key,
    Phase.DELIMITED_KEY: ArgumentReader._read_delimited_key,
    Phase.KEY_END: ArgumentReader._read_key_end,
    Phase.KEY_OR_STRING: ArgumentReader._read_key_or_string,
    Phase.VALUE: ArgumentReader._read_value,
    Phase.STRING: ArgumentReader._read_string,
    Phase.QUOTED: ArgumentReader._read_quoted,
    Phase.QUOTE_END: ArgumentReader._read_quote_end,
    Phase.BARE: ArgumentReader._read_bare,
    Phase.NEXT: ArgumentReader._read_next,
    Phase.AFTER: ArgumentReader._read_after,
    Phase.WRAPPED: ArgumentReader._read_wrapped,
}
"""Each reads from a position and returns the next one."""


def _blank_end(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position
