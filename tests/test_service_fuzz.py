"""The API asked for what its document allows, and for what it does not: schemathesis, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from conformance.service.app import api_app
from conformance.service.ingest import MEDIA_TYPE
from conformance.store.history import Store
from tests.history_runs import accuracy_result, decision, footer, header, items_of, result, sheet, write
from tests.services import TOKEN, app, client


@st.composite
def run_files(draw: st.DrawFn) -> bytes:
    """Run files, most of them damaged in one way or several."""
    texts = st.text(max_size=30)
    head = json.loads(header().model_dump_json())
    verdict = json.loads(result("a").model_dump_json())
    last = json.loads(footer().model_dump_json())
    values: st.SearchStrategy[Any] = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), texts, st.lists(texts, max_size=2), st.just({})
    )
    content = []
    for line in [head, *([verdict] * draw(st.integers(0, 3))), last]:
        changed = dict(line)
        for name in draw(st.lists(st.sampled_from(sorted(line)), max_size=2)):
            changed[name] = draw(values)
        content.append(changed)
    content[0]["run_id"] = draw(st.one_of(st.sampled_from(["run-1", "run-2", "sent"]), texts))
    order = draw(st.permutations(content)) if draw(st.integers(0, 4)) == 0 else content
    data = b"".join(json.dumps(line).encode() + b"\n" for line in order)
    cut = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return data[:cut]


EXAMPLES = {"post": 150}
"""By method; others have fewer, as less can go wrong."""

schemathesis.openapi.media_type(MEDIA_TYPE, st.one_of(run_files(), st.binary(max_size=200)))


@dataclass
class Fuzzed:
    """What is asked by the document, and the pages beside it."""

    document: Any
    pages: TestClient


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzz")
    answers = sheet(items_of({"correct": 5, "wrong": 2}))
    with Store(f"sqlite:///{folder}/history.sqlite", create=True) as store:
        for n in (1, 2):
            head = header(f"run-{n}", f"2026-11-0{n}T02:00:00+00:00")
            store.merge_file(
                write(
                    folder / f"{n}.jsonl",
                    head,
                    accuracy_result(answers, decision(answers)),
                    result("b", "pass" if n == 1 else "fail"),
                    footer(),
                )
            )
        document = "/api/v1/openapi.json"
        loaded = schemathesis.openapi.from_asgi(document, app(store), headers={"Host": "localhost"})
        yield Fuzzed(loaded, client(store))


def operations() -> Iterator[tuple[str, str, GenerationMode]]:
    """What the document has, to be asked as it allows, and as it does not."""
    for path, item in api_app().openapi()["paths"].items():
        for method, said in item.items():
            yield method, path, GenerationMode.POSITIVE
            if said.get("parameters"):  # else no query of it is wrong
                yield method, path, GenerationMode.NEGATIVE


@pytest.mark.parametrize(("method", "path", "mode"), list(operations()))
def test_every_answer_is_as_the_document_says(
    api: Fuzzed, method: str, path: str, mode: GenerationMode
) -> None:
    # Of a run file the document says that it is a text; its reader judges the rest.
    excluded = [positive_data_acceptance] if method == "post" else []
    seen = set()

    @hypothesis.settings(
        max_examples=EXAMPLES.get(method, 20),
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=api.document[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        headers = {"Host": "localhost", "Authorization": f"Bearer {TOKEN}"}
        answer = case.call_and_validate(headers=headers, excluded_checks=excluded)
        seen.add(answer.status_code)
        if method == "post" and answer.status_code in (200, 201):
            run_id = answer.json()["run_id"]
            for page in ("/", f"/runs/{run_id}/", f"/runs/{run_id}/policies.html", f"/api/v1/runs/{run_id}"):
                assert api.pages.get(page).status_code == 200, f"{page}, after {case.body!r}"

    ask()
    if method == "post":
        assert {200, 201, 422} <= seen
