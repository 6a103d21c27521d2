"""Visit every chunking of an output, by merging equal parser states.

An output of n pieces can be cut in 2^(n-1) ways. Two streams that stand at the same piece with equal
parser states and equal output so far cannot differ afterwards, so they are followed once. Most parsers
have one or two distinct states a position, which makes the search about n²/2 feeds.

1. The state is the session's whole object graph. An object that cannot be copied and compared
   faithfully (a generator, a lock, a closure over something mutable) ends the search: no certificate.
2. State outside that graph (a module's global, a class attribute) is invisible to the search. It is
   looked for by an audit: seeded chunkings are replayed on fresh sessions and must end where the
   search says. A mismatch ends the search: no certificate.
3. The search is exact: the numbers of chunkings of all outcomes add up to 2^(n-1).

Standard library only: this runs inside the engines' environments.
"""

from __future__ import annotations

import enum
import functools
import gc
import io
import itertools
import random
import re
import struct
import time
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_AUDITS = 12
"""Replayed chunkings besides the two extremes. A parser that counts its feeds in a global is caught by
the first; one that misbehaves on a share p of chunkings escapes with probability (1-p)^12."""


_SPARES = 64
"""Sessions that one state keeps ready; a step that finds none makes a copy."""


class Session(Protocol):
    """One stream through a fresh parser."""

    shared: tuple[object, ...]
    """Objects that the stream never writes to, such as a tokenizer, or containers of them: neither these nor
    what a container among them holds is copied; they are compared by identity."""

    def feed(self, text: str, ids: list[int], finished: bool) -> list[dict[str, Any]]:
        """Hand over one chunk; return the deltas it brings, in the JSON form of `protocol.Delta`."""
        ...


class OpaqueStateError(Exception):
    """The session's state cannot be copied or compared."""


# ---------------------------------------------------------------------------- copying and comparing

_VALUES = (type(None), bool, int, float, complex, str, bytes, range)
_CONSTANTS = (type, types.ModuleType, re.Pattern, enum.Enum, type(Ellipsis), type(NotImplemented))
_CONSTANT_NAMES = frozenset({("_regex", "Pattern")})
"""Types of the engines' dependencies whose objects never change, by module and name."""
_WRAPPERS = (
    tuple, frozenset, types.MappingProxyType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType,
)  # fmt: skip
_CONTAINERS = (list, deque, dict, Counter, OrderedDict, defaultdict, set)
Key = Any


class _Copier:
    """Copies an object graph and describes it by a hashable key, in one walk."""

    def __init__(self, shared: Sequence[object]) -> None:
        self._pinned = shared  # keeps the ids below valid
        self._shared = {id(item): number for number, item in enumerate(_reachable(shared))}

    def copy(self, value: Any) -> tuple[Any, Key]:
        """Return a copy and a key; equal keys mean equal graphs."""
        self._copies: dict[int, Any] = {}
        self._order: dict[int, int] = {}
        try:
            return self._walk(value)
        except RecursionError:
            raise OpaqueStateError("the parser's state is nested too deeply to compare") from None

    def _walk(self, value: Any) -> tuple[Any, Key]:
        kind: type = type(value)
        if kind is str or kind is int or kind is bool or value is None:
            return value, (kind, value)
        identity = id(value)
        if identity in self._shared:
            return value, ("shared", self._shared[identity])
        if identity in self._order:
            return self._copies[identity], ("again", self._order[identity])
        match _sort_of(kind):
            case "constant":
                return value, (kind, identity)
            case "value":
                return value, (kind, repr(value) if kind is float or kind is complex else value)
            case "wrapper":
                return self._walk_wrapper(value, kind)
        self._order[identity] = len(self._order)
        if kind in _CONTAINERS:
            return self._walk_container(value, kind, identity)
        if kind is bytearray:
            self._copies[identity] = bytearray(value)
            return self._copies[identity], (kind, bytes(value))
        if kind is io.StringIO:
            text, position = value.getvalue(), value.tell()
            copy = self._copies[identity] = io.StringIO(text)
            copy.seek(position)
            return copy, (kind, text, position)
        return self._walk_object(value, kind, identity)

    def _walk_wrapper(self, value: Any, kind: type) -> tuple[Any, Key]:
        """Copy an immutable object around others; one such object or two equal ones, it is the same."""
        if isinstance(value, types.FunctionType):
            _refuse_state_of(value)
            return value, (kind, id(value))
        if isinstance(value, types.MethodType):
            owner, key = self._walk(value.__self__)
            return types.MethodType(value.__func__, owner), (kind, id(value.__func__), key)
        if isinstance(value, types.BuiltinFunctionType):
            if _is_constant(value):
                return value, (kind, id(value))
            owner, key = self._walk(value.__self__)
            return getattr(owner, value.__name__), (kind, value.__name__, key)
        if isinstance(value, types.MappingProxyType):
            (mapping,) = gc.get_referents(value)
            inner, key = self._walk(mapping)
            return types.MappingProxyType(inner), (kind, key)
        if kind.__dictoffset__:
            raise OpaqueStateError(f"{_name(kind)} has attributes besides its items")
        pairs = [self._walk(v) for v in value]
        copies, keys = [c for c, _ in pairs], [k for _, k in pairs]
        if isinstance(value, tuple):
            return tuple.__new__(kind, copies), (kind, tuple(keys))
        return frozenset.__new__(kind, copies), (kind, frozenset(keys))

    def _walk_container(self, value: Any, kind: type, identity: int) -> tuple[Any, Key]:
        extra: Key = None
        if kind is deque:
            copy: Any = deque(maxlen=value.maxlen)
            extra = value.maxlen
        elif kind is defaultdict:
            factory, extra = self._walk(value.default_factory)
            copy = defaultdict(factory)
        else:
            copy = kind()
        self._copies[identity] = copy
        keys: list[Key] = []
        if isinstance(copy, dict):
            for name, item in value.items():
                (cn, kn), (c, k) = self._walk(name), self._walk(item)
                copy[cn] = c
                keys.append((kn, k))
        else:
            add = copy.add if kind is set else copy.append
            for item in value:
                c, k = self._walk(item)
                add(c)
                keys.append(k)
        return copy, (kind, extra, frozenset(keys) if kind is set else tuple(keys))

    def _walk_object(self, value: Any, kind: type, identity: int) -> tuple[Any, Key]:
        names = _attribute_names(value, kind)
        if names is None:
            raise OpaqueStateError(f"an object of type {_name(kind)} cannot be compared")
        copy: Any = object.__new__(kind)
        self._copies[identity] = copy
        keys: list[Key] = []
        for name in names:
            if name == "__dict__":
                attributes, key = self._walk_attributes(value.__dict__)
                object.__setattr__(copy, "__dict__", attributes)
            else:
                attribute, key = self._walk(getattr(value, name))
                object.__setattr__(copy, name, attribute)
            keys.append((name, key))
        return copy, (kind, tuple(keys))

    def _walk_attributes(self, attributes: dict[str, Any]) -> tuple[dict[str, Any], Key]:
        """An instance's `__dict__`; most of it is atoms, which this spares a call each."""
        copies: dict[str, Any] = {}
        keys: list[Key] = []
        for name, item in attributes.items():
            kind = type(item)
            if kind is str or kind is int or kind is bool or item is None:
                copies[name] = item
                keys.append((name, kind, item))
            else:
                copies[name], key = self._walk(item)
                keys.append((name, key))
        return copies, tuple(keys)


def _reachable(shared: Sequence[object]) -> list[object]:
    """The shared objects, and what the plain containers among them hold."""
    found: list[object] = []
    seen: set[int] = set()
    queue = list(shared)
    while queue:
        item = queue.pop()
        if type(item) in _VALUES or id(item) in seen:
            continue
        seen.add(id(item))
        found.append(item)
        if isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            queue.extend(item)
    return found


def _refuse_state_of(function: types.FunctionType) -> None:
    """Refuse a function that carries objects of its own: no copy of it could be told from the original."""
    queue, seen = [function], {id(function)}
    while queue:
        inner = queue.pop()
        held = [_cell(c) for c in inner.__closure__ or ()]
        held += [*(inner.__defaults__ or ()), *(inner.__kwdefaults__ or {}).values()]
        held += inner.__dict__.values()
        for item in held:
            if isinstance(item, types.FunctionType):
                if id(item) not in seen:
                    seen.add(id(item))
                    queue.append(item)
            elif type(item) not in _VALUES and not _is_constant(item):
                raise OpaqueStateError(f"function {function.__qualname__} holds state")


def _is_constant(value: Any) -> bool:
    """Whether a copy may share this object, as it is one and the same in every stream."""
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, type | types.ModuleType)
    kind: type = type(value)
    return _sort_of(kind) == "constant"


@functools.cache
def _sort_of(kind: type) -> str:
    """How objects of a type are walked: as a constant, a value, a wrapper, or (``) by what they are."""
    if issubclass(kind, _CONSTANTS) or (kind.__module__, kind.__qualname__) in _CONSTANT_NAMES:
        return "constant"
    if issubclass(kind, _VALUES) and not kind.__dictoffset__:
        return "value"
    return "wrapper" if issubclass(kind, _WRAPPERS) else ""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _attribute_names(value: Any, kind: type) -> list[str] | None:
    """Attributes that hold the whole state of a Python-level object; None if it has other state."""
    slots = _slots_of(kind)
    if slots is None:
        return None
    names = [name for name in slots if hasattr(value, name)]
    return [*names, "__dict__"] if hasattr(value, "__dict__") else names


@functools.cache
def _slots_of(kind: type) -> tuple[str, ...] | None:
    """Names of all slots of a type and its bases; None if its objects have state out of sight."""
    if any(not base.__flags__ & _HEAPTYPE for base in kind.__mro__[:-1]) or kind.__itemsize__:
        return None  # inherits from a type written in C
    names: list[str] = []
    for base in kind.__mro__[:-1]:
        declared = base.__dict__.get("__slots__", ())
        for slot in (declared,) if isinstance(declared, str) else declared:
            if slot in ("__dict__", "__weakref__"):
                continue
            mangled = slot.startswith("__") and not slot.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{slot}" if mangled else slot)
    if kind.__basicsize__ > _python_size(kind, len(names)):
        return None  # as above: since Python 3.9 types written in C may be heap types too
    return tuple(names)


_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made at run time, as class statements do
_MANAGED_DICT = 1 << 4  # Py_TPFLAGS_MANAGED_DICT: `__dict__` stands outside the object's fixed part
_POINTER = struct.calcsize("P")


def _python_size(kind: type, slots: int) -> int:
    """Bytes an object needs whose only state is its slots and `__dict__` (what `object` checks to pickle)."""
    pointers = slots
    pointers += kind.__dictoffset__ != 0 and not kind.__flags__ & _MANAGED_DICT
    pointers += kind.__weakrefoffset__ > 0
    return object.__basicsize__ + pointers * _POINTER


# ---------------------------------------------------------------------------- what a client has so far


class Assembled:
    """Deltas put together by call index, as OpenAI clients do."""

    __slots__ = ("calls", "content", "reasoning")

    def __init__(self) -> None:
        self.reasoning = ""
        self.content = ""
        self.calls: tuple[tuple[int, str, str], ...] = ()

    def plus(self, deltas: Sequence[dict[str, Any]]) -> Assembled:
        """This, and what the deltas add."""
        new = Assembled()
        new.reasoning, new.content = self.reasoning, self.content
        calls = {index: [name, arguments] for index, name, arguments in self.calls}
        for delta in deltas:
            new.reasoning += delta.get("reasoning") or ""
            new.content += delta.get("content") or ""
            for part in delta.get("tool_calls") or ():
                call = calls.setdefault(part["index"], ["", ""])
                call[0] += part.get("name") or ""
                call[1] += part.get("arguments") or ""
        new.calls = tuple((index, name, arguments) for index, (name, arguments) in calls.items())
        return new

    def key(self) -> Key:
        """Hashable form."""
        return (self.reasoning, self.content, self.calls)

    def result(self) -> dict[str, Any]:
        """In the JSON form of `protocol.ParseResult`."""
        return {
            "reasoning": self.reasoning or None,
            "content": self.content or None,
            "tool_calls": [{"name": name, "arguments": arguments} for _, name, arguments in self.calls],
        }

    @property
    def ragged(self) -> bool:
        """Whether the indices, in order of appearance, are anything but 0..n-1."""
        return [index for index, _, _ in self.calls] != list(range(len(self.calls)))


# ---------------------------------------------------------------------------- the search


class _Node:
    """A distinct state at one position. Compared by identity: keys are long, nodes are unique."""

    __slots__ = ("assembled", "cuts", "sessions", "ways")

    def __init__(self, assembled: Assembled, cuts: tuple[int, ...]) -> None:
        self.sessions: list[Any] = []
        """Sessions in this state: the first is kept to be copied, the others are there to be used up."""
        self.assembled = assembled
        self.cuts = cuts
        self.ways = 0


class _LimitError(Exception):
    """The search grew too large or took too long."""


def certify(
    open_session: Callable[[], Session],
    pieces: Sequence[dict[str, Any]],
    *,
    unit: str,
    max_states: int,
    max_seconds: float,
) -> dict[str, Any]:
    """Search all chunkings; return the JSON form of `protocol.Certificate`.

    Args:
        open_session: Makes a session with a fresh parser.
        pieces: JSON forms of `protocol.Piece`.
        unit: What the pieces are; copied into the answer.
        max_states: Give up beyond this many distinct states.
        max_seconds: Give up after this time.
    """
    search = _Search(open_session, pieces, max_states, max_seconds)
    answer: dict[str, Any] = {"unit": unit, "pieces": len(pieces), "complete": False, "outcomes": []}
    try:
        search.run()
        search.audit()
    except (OpaqueStateError, _LimitError) as stopped:
        return {**answer, "states": search.states, "reason": str(stopped)}
    return {**answer, "states": search.states, "complete": True, "outcomes": search.outcomes()}


class _Search:
    def __init__(
        self,
        open_session: Callable[[], Session],
        pieces: Sequence[dict[str, Any]],
        max_states: int,
        max_seconds: float,
    ) -> None:
        self._open = open_session
        self._pieces = pieces
        self._max_states = max_states
        self._seconds = max_seconds
        self._deadline = time.monotonic() + max_seconds
        self.states = 0
        self._levels: list[dict[Key, _Node]] = [{} for _ in range(len(pieces) + 1)]
        self._steps: dict[tuple[int, int], _Node | Key] = {}
        self._ends: dict[Key, dict[str, Any]] = {}

    def run(self) -> None:
        """Visit every state, position by position."""
        session = self._open()
        self._copier = _Copier(session.shared)
        self._root = self._visit(0, session, Assembled(), ())
        self._root.ways = 1
        n = len(self._pieces)
        for i in range(max(n, 1)):
            for node in self._levels[i].values():
                for j in range(i + 1, n + 1) if n else (0,):
                    self._step(i, node, j)
                node.sessions = []  # no longer needed; frees memory
            if i == 0:
                self._give_up_early(n)

    def _give_up_early(self, n: int) -> None:
        """Stop if the first position says that the rest cannot be done in time."""
        left = self._deadline - time.monotonic()
        estimate = (self._seconds - left) * n / 2
        if estimate > 2 * self._seconds:
            raise _LimitError(f"the search would take about {estimate:.0f} s")

    def _step(self, i: int, node: _Node, j: int) -> None:
        """Feed pieces i..j to a copy of the node's session."""
        if time.monotonic() > self._deadline:
            raise _LimitError("the time limit of the search was reached")
        spare = len(node.sessions) > 1
        session = node.sessions.pop() if spare else self._copier.copy(node.sessions[0])[0]
        last = j == len(self._pieces)
        cuts = node.cuts if last else (*node.cuts, j)
        deltas, error = self._feed(session, i, j, last)
        assembled = node.assembled.plus(deltas)
        if last or error:
            # After an error nothing more is fed: every way to cut the rest ends in it.
            ways = node.ways if last else node.ways << (len(self._pieces) - j - 1)
            self._steps[id(node), j] = self._end(assembled, cuts, ways, error)
            return
        arrived = self._visit(j, session, assembled, cuts)
        arrived.ways += node.ways
        self._steps[id(node), j] = arrived

    def _feed(self, session: Any, i: int, j: int, last: bool) -> tuple[list[dict[str, Any]], str | None]:
        chunk = self._pieces[i:j]
        text, ids = "".join(p["text"] for p in chunk), [t for p in chunk for t in p["ids"]]
        try:
            return session.feed(text, ids, last), None
        except Exception as exc:  # noqa: BLE001 - whatever the engine raises is an outcome
            return [], f"{type(exc).__name__}: {exc}"

    def _visit(self, position: int, session: Any, assembled: Assembled, cuts: tuple[int, ...]) -> _Node:
        twin, state = self._copier.copy(session)
        level = self._levels[position]
        key = (state, assembled.key())
        node = level.get(key)
        if node is None:
            self.states += 1
            if self.states > self._max_states:
                raise _LimitError(f"more than {self._max_states} distinct states")
            node = level[key] = _Node(assembled, cuts)
        elif (len(cuts), cuts) < (len(node.cuts), node.cuts):
            node.cuts = cuts
        # Two more for the steps from here, which saves as many copies; the limit is for memory's sake.
        node.sessions += (session, twin)[: _SPARES - len(node.sessions)]
        return node

    def _end(self, assembled: Assembled, cuts: tuple[int, ...], ways: int, error: str | None) -> Key:
        key = (assembled.key(), error)
        known = self._ends.get(key)
        if known is None:
            self._ends[key] = {"assembled": assembled, "cuts": cuts, "ways": ways, "error": error}
            return key
        known["ways"] += ways
        if (len(cuts), cuts) < (len(known["cuts"]), known["cuts"]):
            known["cuts"] = cuts
        return key

    def audit(self) -> None:
        """Replay chunkings on fresh sessions; they must end where the search says."""
        n = len(self._pieces)
        rng = random.Random(n)  # noqa: S311 - a fixed sample, not a secret
        samples = [(), tuple(range(1, n))]
        samples += [tuple(k for k in range(1, n) if rng.random() < density) for density in _densities(rng)]
        for cuts in samples:
            if self._replay(cuts) != self._predict(cuts):
                raise OpaqueStateError("the parser keeps state that a copy of it does not carry")

    def _replay(self, cuts: tuple[int, ...]) -> Key:
        session = self._open()
        assembled = Assembled()
        bounds = [0, *cuts, len(self._pieces)]
        for i, j in itertools.pairwise(bounds):
            deltas, error = self._feed(session, i, j, j == len(self._pieces))
            assembled = assembled.plus(deltas)
            if error:
                return (assembled.key(), error)
        return (assembled.key(), None)

    def _predict(self, cuts: tuple[int, ...]) -> Key:
        node: Any = self._root
        for j in (*cuts, len(self._pieces)):
            node = self._steps[id(node), j]
            if not isinstance(node, _Node):
                break
        return node

    def outcomes(self) -> list[dict[str, Any]]:
        """Distinct results, the one reached by most chunkings first."""
        ends = sorted(self._ends.values(), key=lambda e: -e["ways"])
        return [
            {
                "result": end["assembled"].result(),
                "cuts": list(end["cuts"]),
                "chunkings": str(end["ways"]),
                "error": end["error"],
                "ragged": end["assembled"].ragged,
            }
            for end in ends
        ]


def _densities(rng: random.Random) -> list[float]:
    return [rng.choice((0.05, 0.2, 0.5, 0.8)) for _ in range(_AUDITS)]
