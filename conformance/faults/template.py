"""Faults of the chat template (catalogue class 3): each changes one place of the template's text."""

from __future__ import annotations

from conformance.errors import ConformanceError
from conformance.faults.base import Collection, Patch, replace
from model_impl.chat import render

faults = Collection("template")


def _edit(old: str, new: str) -> Patch:
    """A patch that replaces one stretch of the template.

    Raises:
        ConformanceError: The stretch does not stand there exactly once, so the fault has gone stale.
    """
    text = render._source()
    if text.count(old) != 1:
        raise ConformanceError(
            f"a template fault looks for {old!r}, which stands {text.count(old)} times in the chat template; "
            "bring conformance/faults/template.py up to date with it"
        )
    return replace(render, "_source", lambda: text.replace(old, new))


@faults("turn-closed-early", source=("C01",), area="template", module=render)
def _turn_closed_early() -> Patch:
    """A model turn is closed between two assistant messages that share it."""
    return _edit(
        "{%- elif role == 'model' and speakers and speakers[0]['role'] == 'assistant' -%}",
        "{%- elif false -%}",
    )


@faults("old-thoughts-in-text", source=("C02",), area="template", module=render)
def _old_thoughts_in_text() -> Patch:
    """Thoughts inside stored assistant text are replayed."""
    return _edit("stretch.split('<|channel>')[0]", "stretch")


@faults("thought-left-open", source=("C04",), area="template", module=render)
def _thought_left_open() -> Patch:
    """With thinking off, the generation prompt ends in an open channel."""
    return _edit(
        "{%- if family == 'large' and not thinking -%}\n            {{- '<|channel>thought\\n<channel|>' -}}",
        "{%- if family == 'large' and not thinking -%}\n            {{- '<|channel>thought\\n' -}}",
    )


@faults("empty-thought-missing", source=("C05",), area="template", module=render)
def _empty_thought_missing() -> Patch:
    """With thinking off, a large model is not given its empty thought."""
    return _edit("{%- if family == 'large' and not thinking -%}", "{%- if false -%}")


@faults("results-in-user-turn", source=("C05",), area="template", module=render)
def _results_in_user_turn() -> Patch:
    """Tool responses open a user turn of their own."""
    return _edit("{{- results -}}", "{{- '<turn|>\\n<|turn>user\\n' ~ results if results -}}")


@faults("keyword-parameters-dropped", source=("C10",), area="template", module=render)
def _keyword_parameters_dropped() -> Patch:
    """Parameters named like a schema keyword are left out of the declaration."""
    return _edit("'type'] if own_keys else [] -%}", "'type'] -%}")


@faults("double-bos", source=("C12",), area="template", module=render)
def _double_bos() -> Patch:
    """The prompt begins with two `<bos>`."""
    return _edit("{{- bos_token -}}", "{{- bos_token ~ bos_token -}}")


@faults("thoughts-of-all-turns", source=("C13", "X24"), area="template", module=render)
def _thoughts_of_all_turns() -> Patch:
    """Stored reasoning is replayed for every turn, not only after the last user message."""
    return _edit("{%- if thought and current -%}", "{%- if thought -%}")


@faults("tool-turn-thought-dropped", source=("T42", "C13"), area="template", module=render)
def _tool_turn_thought_dropped() -> Patch:
    """The thought of the current tool turn is left out of the history."""
    return _edit("{%- if thought and current -%}", "{%- if false -%}")


@faults("python-null", source=("C15", "X26"), area="template", module=render)
def _python_null() -> Patch:
    """Null is written as Python's None."""
    return _edit("{{- 'null' -}}", "{{- 'None' -}}")


@faults("thinking-flag-ignored", source=("C16",), area="template", module=render)
def _thinking_flag_ignored() -> Patch:
    """`enable_thinking` does not reach the prompt."""
    return _edit("{%- set thinking = enable_thinking | default(false) -%}", "{%- set thinking = false -%}")
