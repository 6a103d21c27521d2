"""The script: what the scripted checkpoint says, and to what."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_impl.errors import ModelError

_FOLDER = Path(__file__).parent

Text = Annotated[str, Field(min_length=1)]


class ScriptError(ModelError):
    """The script cannot be read, or is not in its form."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Line(_Strict):
    """One answer."""

    id: Annotated[str, Field(pattern=r"^[a-z]+(-[a-z]+)*$")]
    shows: Text
    output: str
    stop: Literal["<turn|>", "<|tool_response>", "<eos>"] = "<turn|>"

    @property
    def key(self) -> str:
        """What a user message must hold to be answered by this line; one token."""
        return f"#{self.id}"

    @property
    def message(self) -> str:
        """A user message that asks for this line."""
        return f"Say {self.key}."


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
    tools: Annotated[tuple[dict[str, Any], ...], Field(strict=False)]
    phrases: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Script:
        ids = [line.id for line in (self.default, *self.lines)]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"ids must be unique; there twice: {', '.join(twice)}")
        return self

    def line(self, name: str) -> Line:
        """The line with an id.

        Raises:
            ScriptError: there is none.
        """
        for line in self.lines:
            if line.id == name:
                return line
        raise ScriptError(f"no line {name!r}; the lines are {', '.join(line.id for line in self.lines)}")


def checkpoint_folder() -> Path:
    """The scripted checkpoint, as any engine loads it."""
    return _FOLDER / "checkpoints" / "scripted"


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
