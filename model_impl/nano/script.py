"""The script: what the scripted checkpoint says, and to what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_impl.errors import ModelError

ADAPTER = "another-line"
"""By which servers are asked for the scripted checkpoint's adapter (`model_impl.nano.adapted`)."""
ADAPTER_SAYS = "I know another line."
"""With the adapter, in the place of the script's default."""

_FOLDER = Path(__file__).parent

Text = Annotated[str, Field(min_length=1)]


class ScriptError(ModelError):
    """The script cannot be read, or is not in its form."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Asked(_Strict):
    """What every line has."""

    id: Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*$")]
    shows: Text

    @property
    def key(self) -> str:
        """What a user message must hold to be answered by this line; one token."""
        return f"#{self.id}"

    @property
    def message(self) -> str:
        """Words of a user message that ask for this line."""
        return f"Say {self.key}."


class Line(_Asked):
    """One answer."""

    output: str
    stop: Literal["<turn|>", "<|tool_response>", "<eos>"] = "<turn|>"


class Sight(_Strict):
    """What is said about how pictures were read."""

    whole: Text
    """In sliding layers, each soft token of a picture saw all others."""
    causal: Text
    """Each saw only those before it, as tokens of text do."""


class PictureLine(_Asked):
    """A line whose answer depends on pictures; it ends with `<turn|>`."""

    each: str = ""
    """What is said of a picture, with its `{colour}` and `{ordinal}`."""
    last_only: bool = False
    """It is said of the last picture alone."""
    sight: Sight | None = None
    """Said instead."""

    @model_validator(mode="after")
    def _says_something(self) -> PictureLine:
        if bool(self.each) == (self.sight is not None):
            raise ValueError("give exactly one of `each` and `sight`")
        return self


class Pictures(_Strict):
    """What is said about pictures."""

    colours: dict[str, Annotated[tuple[int, int, int], Field(strict=False)]]
    """Red, green and blue of pictures of one colour."""
    motley: Text
    """The colour of any other picture."""
    ordinals: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    """As many as there may be pictures in one conversation."""
    without: Text
    """The answer where there is no picture."""
    lines: Annotated[tuple[PictureLine, ...], Field(min_length=1, strict=False)]

    def output(self, line: PictureLine, colours: Sequence[str], *, causal: bool = False) -> str:
        """The answer to a line, without its stop token.

        Args:
            line: One of `lines`.
            colours: Of all pictures in the conversation, in their order.
            causal: The soft tokens of a picture saw only those before them.
        """
        if not colours:
            return self.without
        if line.sight is not None:
            return line.sight.causal if causal else line.sight.whole
        pairs = list(zip(self.ordinals, colours, strict=False))
        said = [line.each.format(ordinal=ordinal, colour=colour) for ordinal, colour in pairs]
        text = ", ".join(said[-1:] if line.last_only else said)
        return f"{text[0].upper()}{text[1:]}."

    def line(self, name: str) -> PictureLine:
        """The line with an id.

        Raises:
            ScriptError: there is none.
        """
        return _found(self.lines, name)


class AfterResults(_Strict):
    """The answer to any conversation that ends with a tool's result."""

    content: Text
    thought: Text

    def output(self, *, thinking: bool) -> str:
        """What is generated; with thinking on, the template has opened a thought in the prompt."""
        return f"{self.thought}\n<channel|>{self.content}" if thinking else self.content


class Script(_Strict):
    """All that the scripted checkpoint says."""

    default: Line
    after_results: AfterResults
    lines: Annotated[tuple[Line, ...], Field(min_length=1, strict=False)]
    pictures: Pictures
    tools: Annotated[tuple[dict[str, Any], ...], Field(strict=False)]
    phrases: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Script:
        ids = [line.id for line in (self.default, *self.lines, *self.pictures.lines)]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"ids must be unique; there twice: {', '.join(twice)}")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all lines."""
        return tuple(line.key for line in (*self.lines, *self.pictures.lines))

    def line(self, name: str) -> Line:
        """The line with an id, if it is not about pictures.

        Raises:
            ScriptError: there is none.
        """
        return _found(self.lines, name)


_AnyLine = TypeVar("_AnyLine", Line, PictureLine)


def _found(lines: Sequence[_AnyLine], name: str) -> _AnyLine:
    for line in lines:
        if line.id == name:
            return line
    raise ScriptError(f"no line {name!r}; the lines are {', '.join(line.id for line in lines)}")


def checkpoint_folder() -> Path:
    """The scripted checkpoint, as any engine loads it."""
    return _FOLDER / "checkpoints" / "scripted"


def adapter_folder() -> Path:
    """Its LoRA adapter, in PEFT's form (`model_impl.nano.adapted`)."""
    return _FOLDER / "checkpoints" / "scripted-adapter"


@cache
def load_script() -> Script:
    """The script of the committed checkpoint."""
    return read_script(_FOLDER / "script.yaml")


def read_script(path: Path) -> Script:
    """Read a script.

    Raises:
        ScriptError: it cannot be read, or is not in the form above.
    """
    try:
        return Script.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScriptError(f"{path}: cannot be read as YAML: {error}") from error
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, found['loc'])) or 'script'}: {found['msg']}" for found in error.errors()
        )
        raise ScriptError(f"{path}: {'; '.join(problems)}") from None
