"""Sessions and objects for the tests of the certificate search: faithful, faulty, and opaque ones."""

from __future__ import annotations

import array
import enum
import functools
import io
import itertools
import random
import re
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import regex


class Session:
    """Base of the toys: content is what `read` gives for each chunk."""

    shared: tuple[object, ...] = ()

    def feed(self, text: str, ids: list[int], finished: bool) -> list[dict[str, Any]]:
        return [{"content": self.read(text, finished)}]

    def read(self, text: str, finished: bool) -> str:
        raise NotImplementedError


class Faithful(Session):
    """Holds back what may become `<x>`, and drops it."""

    def __init__(self) -> None:
        self.held = ""

    def read(self, text: str, finished: bool) -> str:
        text = (self.held + text).replace("<x>", "")
        keep = 0 if finished else max((k for k in (1, 2) if text.endswith("<x>"[:k])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


class SplitMarkerMissed(Session):
    """Drops `<x>` only where a chunk holds all of it."""

    def read(self, text: str, finished: bool) -> str:
        return text.replace("<x>", "")


class CountsChunks(Session):
    """Says how many chunks came: every number of chunks is another outcome."""

    def __init__(self) -> None:
        self.chunks: list[str] = []

    def read(self, text: str, finished: bool) -> str:
        self.chunks.append(text)
        return str(len(self.chunks)) if finished else ""


class LosesAfterLongChunk(Session):
    """Drops the chunk that follows one of three characters or more."""

    def __init__(self) -> None:
        self.skip = False

    def read(self, text: str, finished: bool) -> str:
        skip, self.skip = self.skip, len(text) >= 3
        return "" if skip else text


class RaisesAtChunkStart(Session):
    """Raises on a chunk that begins with `<`, unless it is the first."""

    def __init__(self) -> None:
        self.first = True

    def read(self, text: str, finished: bool) -> str:
        first, self.first = self.first, False
        if text[:1] == "<" and not first:
            raise ValueError(f"chunk {text!r}")
        return text


class RaggedIndices(Session):
    """Gives the call the index of the chunk that it begins in."""

    def __init__(self) -> None:
        self.number = -1

    def feed(self, text: str, ids: list[int], finished: bool) -> list[dict[str, Any]]:
        self.number += 1
        index = min(self.number, 2)
        return [{"tool_calls": [{"index": index, "name": "f", "arguments": text}]}] if "<" in text else []


class Frugal(Session):
    """Slots, aliases, cycles and every container that can be copied; it loses doubled letters."""

    __slots__ = (
        "__private",
        "again",
        "bag",
        "cycle",
        "log",
        "names",
        "queue",
        "seen",
        "table",
        "tell",
        "unset",
    )

    def __init__(self) -> None:
        self.log = io.StringIO()
        self.queue: deque[str] = deque(maxlen=3)
        self.again = self.queue
        self.seen = {"start"}
        self.table: defaultdict[str, list[str]] = defaultdict(list)
        self.bag = (Counter("a"), OrderedDict(z=1), bytearray(b"x"), types.MappingProxyType({"k": [1]}))
        self.cycle: list[Any] = [self]
        self.cycle.append(self.cycle)
        self.__private = 0
        self.tell = self.log.write

    def read(self, text: str, finished: bool) -> str:
        out = []
        for character in text:
            if self.again and self.again[-1] == character and len(text) > 1:
                continue
            self.queue.append(character)
            self.table[character].append(character)
            self.bag[0][character] += 1
            self.bag[2].append(ord(character))
            self.bag[3]["k"].append(1)
            self.seen.add(character)
            self.__private += 1
            self.tell(character)
            out.append(character)
        assert self.cycle[0] is self
        assert self.cycle[1] is self.cycle
        assert self.log.getvalue().endswith("".join(out))
        state = sum(map(len, self.table.values())), len(self.bag[2]), len(self.bag[3]["k"]), self.__private
        return "".join(out) + (f"{state}{sorted(self.seen)}{self.bag[0]['a']}" if finished else "")


TOYS = [
    Faithful,
    SplitMarkerMissed,
    CountsChunks,
    LosesAfterLongChunk,
    RaisesAtChunkStart,
    RaggedIndices,
    Frugal,
]


# ---------------------------------------------------------------------------------------- refused


class Generator(Session):
    """Keeps its state in a suspended generator."""

    def __init__(self) -> None:
        self.run = self._run()
        next(self.run)

    def _run(self) -> Any:
        seen = ""
        while True:
            seen += yield seen

    def read(self, text: str, finished: bool) -> str:
        return self.run.send(text) or ""


class GeneratorMethod(Generator):
    """The same, behind the generator's bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.push = self.run.send
        del self.run

    def read(self, text: str, finished: bool) -> str:
        return self.push(text) or ""


class Holder(Session):
    """Any object besides a faithful parser."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def read(self, text: str, finished: bool) -> str:
        return text


class Closure(Session):
    """Keeps its state in a function's closure."""

    def __init__(self) -> None:
        seen: list[str] = []

        def remember(text: str) -> int:
            seen.append(text)
            return len(seen)

        self.remember = remember

    def read(self, text: str, finished: bool) -> str:
        return text if self.remember(text) < 3 else ""


class NestedClosure(Closure):
    """The same, one function further in."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.remember
        self.remember = lambda text: inner(text)


class DefaultArgument(Session):
    """Keeps its state in a default argument made for this session."""

    def __init__(self) -> None:
        self.remember = lambda text, seen=[]: seen.append(text) or len(seen)

    def read(self, text: str, finished: bool) -> str:
        return text if self.remember(text) < 3 else ""


class StrWithAttributes(str):
    pass


class ListOfMine(list[str]):
    pass


class Tagged(tuple[int, ...]):
    pass


REFUSED: dict[str, Callable[[], Any]] = {
    "generator": Generator,
    "bound-method-of-generator": GeneratorMethod,
    "iterator": lambda: Holder(iter([1, 2])),
    "itertools": lambda: Holder(itertools.count()),
    "lock": lambda: Holder(threading.Lock()),
    "local": lambda: Holder(threading.local()),
    "random": lambda: Holder(random.Random(1)),
    "array": lambda: Holder(array.array("i", [1])),
    "partial": lambda: Holder(functools.partial(print, [])),
    "weak": lambda: Holder(weakref.ref(Session)),
    "bytes-io": lambda: Holder(io.BytesIO()),
    "cached-function": lambda: Holder(functools.lru_cache(len)),
    "str-subclass": lambda: Holder(StrWithAttributes("a")),
    "list-subclass": lambda: Holder(ListOfMine()),
    "tuple-subclass": lambda: Holder(Tagged((1,))),
    "closure": Closure,
    "closure-in-closure": NestedClosure,
    "default-argument": DefaultArgument,
    "too-deep": lambda: Holder(functools.reduce(lambda inner, _: [inner], range(5000), [])),
}


GLOBAL: dict[str, Any] = {"feeds": 0, "held": ""}


class GlobalCounter(Session):
    """Loses every third feed of the process."""

    def read(self, text: str, finished: bool) -> str:
        GLOBAL["feeds"] += 1
        return text if GLOBAL["feeds"] % 3 else ""


class GlobalBuffer(Session):
    """Holds text in a module's global, made anew for each session."""

    def __init__(self) -> None:
        GLOBAL["held"] = ""

    def read(self, text: str, finished: bool) -> str:
        text, GLOBAL["held"] = GLOBAL["held"] + text[:-1], text[-1:]
        return text + (GLOBAL["held"] if finished else "")


class ClassAttribute(Session):
    """Holds text in a class attribute, made anew for each session."""

    held: ClassVar[list[str]] = []

    def __init__(self) -> None:
        ClassAttribute.held = []

    def read(self, text: str, finished: bool) -> str:
        self.held.append(text)
        return "".join(self.held) if finished else ""


class SharedTooMuch(Session):
    """Calls something shared that it writes to."""

    def __init__(self) -> None:
        self.buffer: list[str] = []
        self.shared = (self.buffer,)

    def read(self, text: str, finished: bool) -> str:
        self.buffer.append(text)
        return "".join(self.buffer) if finished else ""


class ClassCounter(Session):
    """Counts its feeds in a class attribute that nothing resets."""

    feeds = 0

    def read(self, text: str, finished: bool) -> str:
        ClassCounter.feeds += 1
        return text.upper() if ClassCounter.feeds % 2 else text


UNSEEN = [GlobalCounter, GlobalBuffer, ClassAttribute, ClassCounter, SharedTooMuch]

# ---------------------------------------------------------------------------------------- copied


class Colour(enum.Enum):
    RED = 1


Point = namedtuple("Point", "x y")


class Parent:
    __slots__ = ("__hidden", "left")

    def __init__(self) -> None:
        self.__hidden = [1]
        self.left = {"a": {1, 2}}

    def hidden(self) -> list[int]:
        return self.__hidden


class Child(Parent):
    """A `__dict__` below slots, and a constructor that a copy must not run."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Child.made += 1
        self.method = self.hidden
        self.same_method = self.method
        self.append = self.hidden().append
        self.point = Point([1], 2)
        self.items = {
            Colour.RED: re.compile("a"),
            "b": regex.compile("b"),
            "c": len,
            "d": Colour,
            "e": re,
            "f": ...,
        }
        self.key: list[Any] = [
            {id: frozenset({1, (2, 3)})},
            1.5,
            float("nan"),
            -0.0,
            2j,
            b"x",
            range(3),
            True,
        ]


COPYABLE: dict[str, Callable[[], Any]] = {
    "child": Child,
    **{toy.__name__: toy for toy in TOYS},
    "members": lambda: Holder({Child()}),
}
