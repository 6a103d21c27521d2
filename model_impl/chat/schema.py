"""Types of tool arguments: from a lexeme and a JSON Schema to JSON text.

The rules are those of `docs/parsing.md`, section 5. Numbers stay text throughout, so that no digit is
lost and no lexeme, however long, costs more than linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

Schema = Mapping[str, Any]

_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\Z")
_LOOSE_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?([eE][+-]?[0-9]+)?\Z")
_INDEX = re.compile(r"(?:0|[1-9][0-9]{0,8})\Z")
_MAX_HOPS = 32
"""How many `$ref` and union steps are followed; deeper ones count as no schema (cycles end here)."""
_UNION_KEYS = ("anyOf", "oneOf", "allOf")
_TYPE_OF = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


quote = json.JSONEncoder(ensure_ascii=False).encode
"""JSON string of a text, non-ASCII characters as they are."""


def declared(tools: tuple[Mapping[str, Any], ...], name: str) -> Mapping[str, Any] | None:
    """The declaration of the function `name`, or None.

    Args:
        tools: Tools in OpenAI's form, or bare `{"name", "parameters"}` mappings.
        name: Function name as the model wrote it.
    """
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            return function
    return None


def parameters_of(tools: tuple[Mapping[str, Any], ...], name: str) -> Schema | None:
    """JSON Schema of the parameters of the declared function `name`, or None."""
    parameters = (declared(tools, name) or {}).get("parameters")
    return parameters if isinstance(parameters, Mapping) else None


class Node:
    """A place in a schema: the sub-schema that governs one value, with its root for `$ref`."""

    __slots__ = ("_root", "_schema")

    def __init__(self, schema: Any, root: Schema) -> None:
        self._schema = schema
        self._root = root

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        """Schemas are never written to, so copies share them."""
        return self

    def property(self, key: str) -> Node | None:
        """Node of the value under `key`, if the schema says anything about it."""
        for option in self._alternatives():
            properties = option.get("properties")
            if isinstance(properties, Mapping) and key in properties:
                return Node(properties[key], self._root)
        for option in self._alternatives():
            extra = option.get("additionalProperties")
            if isinstance(extra, Mapping):
                return Node(extra, self._root)
        return None

    def item(self, index: int) -> Node | None:
        """Node of array element `index`."""
        for option in self._alternatives():
            prefix = option.get("prefixItems")
            if isinstance(prefix, list) and index < len(prefix):
                return Node(prefix[index], self._root)
            items = option.get("items")
            if isinstance(items, Mapping):
                return Node(items, self._root)
        return None

    def types(self) -> frozenset[str] | None:
        """Allowed JSON types; None where the schema does not restrict them."""
        allowed: set[str] = set()
        for option in self._alternatives():
            allowed |= _declared_types(option)
        return frozenset(allowed) or None

    def _alternatives(self) -> list[Schema]:
        """This schema and the members of its unions, references resolved, outermost first."""
        found: list[Schema] = []
        queue: list[tuple[Any, int]] = [(self._schema, 0)]
        for schema, hops in queue:
            if not isinstance(schema, Mapping) or hops > _MAX_HOPS or len(queue) > _MAX_HOPS**2:
                continue
            found.append(schema)
            if isinstance(schema.get("$ref"), str):
                queue.append((_local_reference(schema["$ref"], self._root), hops + 1))
            for key in _UNION_KEYS:
                members = schema.get(key)
                if isinstance(members, list):
                    queue.extend((member, hops + 1) for member in members)
        return found


def _local_reference(reference: str, root: Schema) -> Any:
    """Resolve a JSON pointer inside `root`, such as `#/$defs/Name`; anything else is None."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    node: Any = root
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and _INDEX.match(key) and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _declared_types(schema: Schema) -> set[str]:
    declared = schema.get("type")
    types = {declared} if isinstance(declared, str) else set()
    if isinstance(declared, list):
        types = {t for t in declared if isinstance(t, str)}
    types = {t.lower() for t in types}  # declarations in the wild write STRING, as the template does
    if not types:
        values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
        if values is None and "const" in schema:
            values = [schema["const"]]
        types = {_TYPE_OF[type(v)] for v in values or () if type(v) in _TYPE_OF}
    if types and schema.get("nullable") is True:
        types.add("null")
    return types


def type_bare(lexeme: str, node: Node | None) -> str:
    """JSON text of a value written without delimiters.

    Args:
        lexeme: The text, trimmed.
        node: What the schema says, or None.
    """
    allowed = node.types() if node is not None else None
    if allowed is not None:
        if "null" in allowed and lexeme.lower() == "null":
            return "null"
        cast = _cast_scalar(lexeme, allowed)
        if cast is not None:
            return cast
        if "string" in allowed:
            return quote(lexeme)
    if lexeme in ("true", "false", "null") or _JSON_NUMBER.match(lexeme):
        return lexeme
    return quote(lexeme)


def type_quoted(text: str, node: Node | None) -> str:
    """JSON text of a delimited value: a string, unless a declared scalar type is spelled exactly."""
    allowed = node.types() if node is not None else None
    if allowed is not None and "string" not in allowed:
        cast = _cast_scalar(text, allowed)
        if cast is not None:
            return cast
    return quote(text)


def may_cast_quoted(node: Node | None) -> bool:
    """Whether `type_quoted` might give anything but a string, so that the text must be held back."""
    allowed = node.types() if node is not None else None
    castable = {"integer", "number", "boolean"}
    return allowed is not None and "string" not in allowed and not allowed.isdisjoint(castable)


def _cast_scalar(lexeme: str, allowed: frozenset[str]) -> str | None:
    if "integer" in allowed:
        integer = _integer(lexeme)
        if integer is not None:
            return integer
    if "number" in allowed:
        number = _number(lexeme)
        if number is not None:
            return number
    if "boolean" in allowed and lexeme.lower() in ("true", "false"):
        return lexeme.lower()
    return None


def _integer(lexeme: str) -> str | None:
    """Canonical integer of `5`, `+5`, `007`, `5.0`; None for `5.5`, `1e5`, `x`."""
    match = _LOOSE_NUMBER.match(lexeme)
    if match is None or match[4] or not match[2] or (match[3] or "").strip("0"):
        return None
    digits = match[2].lstrip("0") or "0"
    return ("-" if match[1] == "-" and digits != "0" else "") + digits


def _number(lexeme: str) -> str | None:
    """JSON number with the same value and digits as `lexeme`, or None."""
    if _JSON_NUMBER.match(lexeme):
        return lexeme
    match = _LOOSE_NUMBER.match(lexeme)
    if match is None or not (match[2] or match[3]):
        return None
    sign = "-" if match[1] == "-" else ""
    whole = match[2].lstrip("0") or "0"
    fraction = f".{match[3]}" if match[3] else ""
    return f"{sign}{whole}{fraction}{match[4] or ''}"
