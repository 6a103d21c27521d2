"""The bridge: targets as lm-eval's models, from Python and its command line, on the scripted checkpoint."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from conformance.answering import EvaluationError, UnavailableError
from conformance.lm_eval_model import ConformanceLM, Conversation
from conformance.media import Picture
from conformance.media_files import picture_bytes
from conformance.targets import bundled, registry
from conformance.targets.protocol import EngineOptions, GenerateRequest, Target
from conformance.targets.reference import ReferenceTarget
from model_impl.nano.script import load_script
from tests.conftest import ROOT
from tests.speaking_targets import Generates, Serves

SCRIPT = load_script()
COLOURS = ("red", "green", "blue")
TASKS = ROOT / "conformance" / "tasks"


def ask(text: str, **options: Any) -> Any:
    """One of lm-eval's requests, with the conversation as its chat template makes it."""
    media = {name: options.pop(name) for name in ("visual", "audio") if name in options}
    messages = Conversation(json.dumps([{"role": "user", "content": text}]))
    arguments = (messages, {"until": [], **options}, *([media] if media else []))
    return SimpleNamespace(args=arguments, task_name="t", doc_id=0, doc={})


def shown(colour: str) -> Image.Image:
    return Image.open(io.BytesIO(picture_bytes(Picture(width=90, height=60, colour=colour))))


def picture_line(name: str) -> Any:
    return next(line for line in SCRIPT.pictures.lines if line.id == name)


@pytest.fixture(scope="module", params=["reference", "transformers@5.19.0"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if reason := registry.unavailable(request.param):
        pytest.skip(reason)
    opened = registry.open_target(request.param)
    yield opened
    opened.close()


# ------------------------------------------------------------------------------------------ answers


def test_scripted_answers_come_without_their_thoughts(target: Target) -> None:
    model = ConformanceLM(target, "scripted")
    lines = [line for line in SCRIPT.lines if line.id in ("plain", "unicode", "thought")]
    said = model.generate_until([ask(line.message) for line in lines], disable_tqdm=True)
    contents = [line.output.rpartition("<channel|>")[2] for line in lines]
    assert said == contents
    assert [asked.answer.raw for asked in model.asked] == [line.output + line.stop for line in lines]
    assert any("<channel|>" in line.output for line in lines)


def test_pictures_are_seen(target: Target) -> None:
    model = ConformanceLM(target, "scripted")
    one, several = picture_line("colour"), picture_line("colours")
    asked = [ask(f"<image>{one.message}", visual=[shown(colour)]) for colour in COLOURS]
    asked += [
        ask(f"<image><image>{several.message}", visual=[shown("green"), shown("red")]),
        ask(next(line.message for line in SCRIPT.lines if line.id == "plain")),
    ]
    said = model.generate_until(asked, disable_tqdm=True)
    expected = [SCRIPT.pictures.output(one, [colour]) for colour in COLOURS]
    expected.append(SCRIPT.pictures.output(several, ["green", "red"]))
    expected.append(next(line.output for line in SCRIPT.lines if line.id == "plain"))
    assert said == expected


def test_likelihoods_are_those_of_generation(target: Target) -> None:
    dialogues = bundled.dialogues("alone", ("plain", "unicode"))
    made = target.generate(
        GenerateRequest(
            checkpoint=str(bundled.checkpoint()),
            prompts=tuple(dialogue.prompt for dialogue in dialogues),
            max_new_tokens=100,
            stop_ids=bundled.STOP_IDS,
        )
    ).generations
    model = ConformanceLM(target, "scripted")
    contexts = [
        Conversation(json.dumps([{"role": "user", "content": SCRIPT.line(dialogue.line).message}]))
        for dialogue in dialogues
    ]
    pairs = [(context, bundled.text(d.answer)) for context, d in zip(contexts, dialogues, strict=True)]
    right = [SimpleNamespace(args=pair) for pair in pairs]
    wrong = [SimpleNamespace(args=(context, "The lamp is off.")) for context, _ in pairs]
    found = model.loglikelihood([*right, *wrong], disable_tqdm=True)
    assert [value for value, _ in found[:2]] == pytest.approx([sum(m.logprobs) for m in made], abs=1e-4)
    assert [greedy for _, greedy in found] == [True, True, False, False]
    assert max(value for value, _ in found[2:]) < -5


def test_targets_agree_on_likelihoods_of_any_text(target: Target) -> None:
    requests = [
        SimpleNamespace(args=pair) for pair in (("Grüße aus", " Köln"), ("", "hello"), ("a  ", "lamp"))
    ]
    rolling = [SimpleNamespace(args=("The lamp is on. Who did it, and why?",))]
    expected = ConformanceLM(ReferenceTarget(), "scripted")
    model = ConformanceLM(target, "scripted", batch_size=2, engine=EngineOptions(attention="eager"))
    for mine, theirs in zip(
        model.loglikelihood(requests, disable_tqdm=True),
        expected.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    ):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert model.loglikelihood_rolling(rolling) == pytest.approx(
        expected.loglikelihood_rolling(rolling), abs=1e-3
    )


@pytest.mark.parametrize(
    ("text", "media"),
    [("What is this? <image>", {"visual": ["a picture"]}), ("What is this? <image>", {"visual": []})],
)
def test_likelihoods_of_answers_to_pictures_are_refused(text: str, media: dict[str, Any]) -> None:
    model = ConformanceLM(ReferenceTarget(), "scripted")
    conversation = model.apply_chat_template([{"role": "user", "content": text}])
    request = SimpleNamespace(args=(conversation, "red", media), task_name="colours")
    with pytest.raises(EvaluationError, match=r"^colours: asks how likely .* choose a task whose answers"):
        model.loglikelihood([request], disable_tqdm=True)


def test_likelihoods_of_a_task_s_questions_without_pictures() -> None:
    model = ConformanceLM(ReferenceTarget(), "scripted")
    plain = SimpleNamespace(args=("The lamp", " is on"))
    with_none = SimpleNamespace(args=("The lamp", " is on", {"visual": []}), task_name="colours")
    found = model.loglikelihood([plain, with_none], disable_tqdm=True)
    assert found[0] == pytest.approx(found[1])


def test_a_long_text_is_scored_in_stretches() -> None:
    text = "The lamp is on. " * 4
    whole, pieces = (
        ConformanceLM(ReferenceTarget(), "scripted", max_length=length).loglikelihood_rolling(
            [SimpleNamespace(args=(text,))]
        )[0]
        for length in (2048, 7)
    )
    assert pieces < whole < 0, "what is known of a token is at most the stretch before it"


# ------------------------------------------------------------------------------------------ requests


def test_an_answer_ends_at_the_first_stop_string_and_not_in_the_thought() -> None:
    said = "<|channel>thought\nQuestion: which?<channel|>#### 3 Question: and then? </s>"
    model = ConformanceLM(Generates(lambda prompt: said), "scripted")
    request = ask("hi", until=["</s>", "Question:"], max_gen_toks=200)
    assert model.generate_until([request], disable_tqdm=True) == ["#### 3 "]
    assert model.asked[0].answer.finish_reason == "stop", "the answer is whole"
    assert model.asked[0].answer.raw == said


def test_each_question_keeps_its_own_limit() -> None:
    model = ConformanceLM(Generates(lambda prompt: "one two three four<turn|>"), "scripted")
    requests = [ask("a", max_gen_toks=2), ask("b", max_gen_toks=50)]
    model.generate_until(requests, disable_tqdm=True)
    short, long = (asked.answer for asked in model.asked)
    assert (short.tokens, short.finish_reason, long.finish_reason) == (2, "length", "stop")


def test_the_engine_is_set_up_once_for_the_longest_question() -> None:
    target = Generates(lambda prompt: "ok<turn|>", features=("images",))
    model = ConformanceLM(target, "scripted", batch_size=1)
    questions = [ask("x " * 900), ask("<image>y", visual=[shown("red")]), ask("z")]
    model.generate_until(questions, disable_tqdm=True)
    lengths = {request.options.max_model_len for request in target.asked}
    assert len(target.asked) == 3
    assert len(lengths) == 1
    longest = max(len(ids) for request in target.asked for ids in request.prompts)
    assert max(lengths) >= longest + 256 > 1024


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ("<image>", {"visual": []}, ""),
        ("what?", {"visual": ["red"]}, "no place <image> for 1"),
        ("<image><image>", {"visual": ["red"]}, "more places <image>"),
    ],
)
def test_places_and_media_must_match(text: str, media: dict[str, Any], message: str) -> None:
    model = ConformanceLM(Generates(lambda prompt: "ok<turn|>", features=("images",)), "scripted")
    request = ask(text, visual=[shown(colour) for colour in media["visual"]])
    if not message:
        assert model.generate_until([request], disable_tqdm=True) == ["ok"]
        return
    with pytest.raises(EvaluationError, match=message):
        model.generate_until([request], disable_tqdm=True)


def wav(rate: int) -> bytes:
    made = io.BytesIO()
    soundfile.write(made, np.linspace(-0.5, 0.5, 800, dtype=np.float32), rate, format="FLAC")
    return made.getvalue()


def test_sounds_are_written_for_generation_and_encoded_for_servers() -> None:
    heard: list[Any] = []
    target = Generates(lambda prompt: "ok<turn|>", features=("sounds",))
    for each in (target, server := Serves(lambda text: "ok")):
        model = ConformanceLM(each, "scripted")
        model.generate_until([ask("listen <audio> now", audio=[wav(16_000)])], disable_tqdm=True)
        heard.append(model.asked[0].question.media[0].sha256)
    (row,) = target.asked[0].sounds
    assert len(row) == 1
    assert heard[0] == heard[1]
    audio = next(p for p in server.bodies[0]["messages"][0]["content"] if p["type"] == "input_audio")
    assert audio["input_audio"]["format"] == "wav"
    with pytest.raises(EvaluationError, match="a sound of 8000 samples a second; the models take 16000"):
        ConformanceLM(server).generate_until([ask("<audio>", audio=[wav(8000)])], disable_tqdm=True)


def test_what_targets_cannot_do_is_refused() -> None:
    model = ConformanceLM(Generates(lambda prompt: "ok<turn|>"), "scripted")
    for options in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(EvaluationError, match="targets decode greedily"):
            model.generate_until([ask("hi", **options)], disable_tqdm=True)
    with pytest.raises(EvaluationError, match="begins the answer"):
        model.apply_chat_template([{"role": "assistant", "content": "A"}], add_generation_prompt=False)
    with pytest.raises(UnavailableError, match="says nothing of the likelihood"):
        model.loglikelihood([SimpleNamespace(args=("a", "b"))], disable_tqdm=True)
    server = ConformanceLM(Serves(lambda text: "ok"))
    with pytest.raises(UnavailableError, match="takes no token ids"):
        server.loglikelihood([SimpleNamespace(args=("a", "b"))], disable_tqdm=True)
    bare = SimpleNamespace(args=("a bare text", {}), task_name="t", doc_id=0, doc={})
    with pytest.raises(UnavailableError, match="takes conversations"):
        server.generate_until([bare], disable_tqdm=True)


def test_a_misspelled_argument_is_refused() -> None:
    arguments = {"target": "reference", "checkpoint": "scripted", "thinkng": True}
    with pytest.raises(TypeError, match="thinkng"):
        ConformanceLM.create_from_arg_obj(arguments, {"batch_size": 1, "max_batch_size": 2, "device": "cpu"})
    del arguments["thinkng"]
    ConformanceLM.create_from_arg_obj(arguments, {"batch_size": 1, "max_batch_size": 2, "device": "cpu"})


def test_under_lm_eval_s_command_a_failure_ends_the_run() -> None:
    def dead(prompt: str) -> str:
        raise RuntimeError("never reached")

    class Refuses(Generates):
        def generate(self, request: GenerateRequest) -> Any:
            from conformance.errors import EngineError

            raise EngineError("not today")

    with pytest.raises(EvaluationError, match="generates: refused: not today"):
        ConformanceLM(Refuses(dead), "scripted").generate_until([ask("hi")], disable_tqdm=True)


# ------------------------------------------------------------------------------------------ the command


def lm_eval(command: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    common = ["--model", "conformance", "--apply_chat_template", "--limit", "2", "--batch_size", "4"]
    return subprocess.run(
        [*command, "run", *common, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )


def assert_scored(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if "nano_gsm8k" in line and "exact_match" in line]
    assert table, done.stdout
    assert "flexible-extract" in table[0]


def test_the_documented_command() -> None:
    done = lm_eval(
        [sys.executable, "-m", "conformance.lm_eval_model"],
        *("--model_args", "target=reference,checkpoint=scripted,max_new_tokens=8,thinking=True"),
        *("--include_path", str(TASKS), "--tasks", "nano_gsm8k"),
    )
    assert_scored(done)


def test_lm_eval_s_own_command_knows_the_model_through_a_task_file(tmp_path: Path) -> None:
    done = lm_eval(
        [str(Path(sys.executable).with_name("lm_eval"))],
        *("--model_args", "target=reference,checkpoint=scripted,max_new_tokens=8"),
        *("--tasks", str(TASKS / "nano_gsm8k.yaml"), "--log_samples", "--output_path", str(tmp_path)),
    )
    assert_scored(done)
    (samples,) = tmp_path.rglob("samples_nano_gsm8k_*.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 4  # two filters
