"""Suite files: pydantic models, discriminated by `kind`.

A suite is one YAML file under `suites/`. `conformance.loading` turns files into these models and
maps every validation error back to its line; `conformance schema suite` prints their JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from conformance.contract_suite import ContractCase, ContractSuite
from conformance.gates.suite import AccuracyCase, AccuracySuite
from conformance.invariance_suite import InvarianceCase, InvarianceSuite
from conformance.lora_suite import LoraCase, LoraSuite
from conformance.media import Budget, MediaPiece, Picture, Piece, TextPiece, what
from conformance.media import PicturePrompt as PicturePrompt
from conformance.scoring_suite import ScoringCase, ScoringSuite
from conformance.suitebase import CaseBase, CaseId, OracleSpec, Strict, SuiteBase
from conformance.targets.protocol import (
    AttentionBackend,
    DType,
    EngineOptions,
    KVDType,
    LongBlocks,
    MediaForm,
    Speculation,
)

PROMPTS: dict[str, str] = {
    "model": "<bos><|turn>user\nHi<turn|>\n<|turn>model\n",
    "thinking": "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    "closed-channel": "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "open-channel": (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
        '<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:<|"|>ok<|"|>}<tool_response|>'
        "<|channel>thought\n"
    ),
}
"""Names that a case may use for `prompt`: what the template leaves at the end of the prompt."""


class PlainText(Strict):
    """A stretch of output made of ordinary tokens, even where it spells a marker."""

    plain: str


class ExpectedCall(Strict):
    """A call that must come out; arguments are compared as JSON values, numbers by value."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ExpectedParse(Strict):
    """Fields after parsing. Absent means empty. Text is compared after trimming whitespace (X11)."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ExpectedCall, ...] = ()


class Answer(ExpectedParse):
    """One accepted answer of a contested case."""

    name: CaseId
    who: str
    """Which engines, tests or maintainers hold this answer."""


class ParserCase(CaseBase):
    """Judge the parsing of one output, whole and streamed."""

    output: str | tuple[str | PlainText, ...]
    prompt: str = "model"
    """A key of `PROMPTS`, or a literal prompt (it then holds `<|turn>`)."""
    thinking: bool | None = None
    tools: str | tuple[dict[str, Any], ...] = ()
    """A key of the suite's `toolsets`, or tools in OpenAI's form."""
    tool_choice: Literal["auto", "none"] = "auto"
    expect: ExpectedParse | None = None
    policy: tuple[Answer, ...] | None = None
    """Accepted answers of a contested case; exactly one of `expect` and `policy` is given."""
    keep: tuple[str, ...] = ()
    """Texts that must survive in some field, whatever the answer (hard rule "nothing lost")."""
    allow_markers: bool = False
    """Marker text in a field is right here; otherwise it is a leak. Implied by an expected field."""
    repeats_keys: bool = False
    """The output itself gives a key twice in one object; the arguments' JSON may do so too."""
    stream_exempt: str = ""
    """Why stream and whole may differ here (a recorded parity exception); empty: they may not."""

    @model_validator(mode="after")
    def _one_verdict(self) -> ParserCase:
        if (self.expect is None) == (self.policy is None):
            raise ValueError("give exactly one of `expect` (agreed answer) and `policy` (contested)")
        if self.policy is not None and len(self.policy) < 2:
            raise ValueError("`policy` needs at least two accepted answers; with one, use `expect`")
        return self


class ExpectedPrompt(Strict):
    """What rendering must give. `prompt` is the exact text; the other fields are partial rules."""

    prompt: str | None = None
    ids: tuple[int, ...] | None = None
    """Exact token ids under the harness's tokenizer, whose ids for known tokens are the published ones."""
    contains: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    endswith: str | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    """Exact number of occurrences of each text."""
    error: bool = False
    """The conversation must be refused."""

    @model_validator(mode="after")
    def _something(self) -> ExpectedPrompt:
        if not self.model_fields_set:
            raise ValueError("`expect` is empty: state at least one rule")
        if self.error and self.model_fields_set != {"error"}:
            raise ValueError("`error: true` stands alone: a refused conversation has no prompt")
        return self


class TemplateCase(CaseBase):
    """Judge the prompt rendered from a conversation."""

    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    tools: str | tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    add_generation_prompt: bool = True
    families: tuple[Literal["large", "e"], ...] = ("large", "e")
    """The case is judged for each of these families; `expect_e` overrides `expect` for `e`."""
    expect: ExpectedPrompt
    expect_e: ExpectedPrompt | None = None


class RandomRows(Strict):
    """Rows of seeded random token ids."""

    random: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(min_length=1)
    """Their lengths."""
    seed: int = 0


class MixedRows(Strict):
    """Rows of seeded random token ids with media among them."""

    pieces: tuple[tuple[Piece, ...], ...] = Field(min_length=1)
    seed: int = 0
    image_budget: Budget = 280
    frame_budget: Budget = 70

    @model_validator(mode="after")
    def _some_media(self) -> MixedRows:
        if not all(self.pieces):
            raise ValueError("a row has no piece")
        if all(isinstance(piece, TextPiece) for row in self.pieces for piece in row):
            raise ValueError("there is nothing but text; use `random`")
        media = [piece for row in self.pieces for piece in row if not isinstance(piece, TextPiece)]
        if not all(what(piece).whole for piece in media):
            raise ValueError("what is damaged or empty has no tensors; it is for suites of kind `processor`")
        return self


class Tolerance(Strict):
    """How far a tensor may be from the oracle's, in float32."""

    relative: float = Field(default=1e-5, gt=0)
    """Of ||a - b|| / ||b||."""
    maximum: float = Field(default=1e-4, gt=0)
    """Of max|a - b| / max|b|."""


Rows = tuple[tuple[Annotated[int, Field(ge=0)], ...], ...] | RandomRows | MixedRows
"""Token ids, or how to draw them."""


class ParityCase(CaseBase):
    """Judge the tensors inside a model against those of the suite's oracle."""

    config: CaseId
    """A key of the suite's `configs`."""
    weights: int = 0
    """Seed of the checkpoint's weights."""
    rows: Rows
    """Token ids, or how to draw them."""
    prefill: int | None = Field(default=None, ge=1)
    """Tokens of every row fed in one call; the rest follows one by one. Absent: all at once."""
    dtype: DType = "float32"
    attention: AttentionBackend | None = None
    """Backend that the target must use; absent: its own choice."""
    tolerance: Tolerance = Tolerance()
    factor: float = Field(default=2.0, ge=1)
    """In bfloat16, a tensor may be this many times as far from the float32 oracle as the oracle's own
    bfloat16 tensor is, and by its largest difference twice as many. It is compared so with float32's
    tolerance as the least."""
    modules: tuple[str, ...] = ()
    """Modules to compare; empty: every module that the configuration has, and the logits."""

    @model_validator(mode="after")
    def _rows_have_tokens(self) -> ParityCase:
        if isinstance(self.rows, tuple) and not (self.rows and all(self.rows)):
            raise ValueError("`rows` needs at least one row, and every row a token")
        return self


class MaskCase(CaseBase):
    """Judge which keys every token sees, in every layer, by the rule of the fact sheet's section 3.6."""

    config: CaseId
    """A key of the suite's `configs`."""
    rows: RandomRows | MixedRows
    long_blocks: LongBlocks | None = None
    """What the target must do with images longer than the window; absent: its own choice, which has to be
    `clamp_past`."""
    attention: AttentionBackend | None = None
    """Backend that the target must use; absent: its own choice."""


class ProcessorCase(CaseBase):
    """Judge what a processor makes of a prompt and its media."""

    form: MediaForm = "tower"
    pieces: tuple[MediaPiece, ...] = Field(min_length=1)
    """The prompt holds a placeholder for each, with text between."""
    image_budget: int = 280
    frame_budget: int = 70
    sample_frames: bool = True
    extra_placeholders: int = Field(default=0, ge=-8, le=8)
    """So many more placeholders of the first piece's kind than pieces, or fewer."""
    soft_tokens: tuple[int, ...] | None = None
    """Of each image, frame and sound in the order of the prompt; absent: only the oracle says."""
    refused: bool = False
    """The target must refuse this, and answer the next request."""
    tolerance: float = Field(default=1e-5, gt=0)
    """How far a pixel or a feature may be from the oracle's."""

    @model_validator(mode="after")
    def _fits_together(self) -> ProcessorCase:
        if self.refused and self.soft_tokens is not None:
            raise ValueError("what is `refused` has no `soft_tokens`")
        return self


Construct = Literal[
    "tokens",
    "answer",
    "content",
    "reasoning",
    "tool-call",
    "parallel-calls",
    "nested-arguments",
    "non-ascii",
    "json",
]
"""What an answer can hold: `tokens` any at all by its usage, `answer` content, reasoning or a call,
`nested-arguments` a call with an object or a list among its arguments, `non-ascii` a character beyond ASCII
in any field, `json` content that is JSON."""


class ImagePart(Strict):
    """A part of a message's content that is a picture; it is sent as a data URL."""

    type: Literal["image"]
    image: Picture


class Neighbour(Strict):
    """What another user says with pictures."""

    content: tuple[dict[str, Any], ...] = Field(min_length=1)
    """As in a message."""


class ExactAnswer(ExpectedParse):
    """What the scripted checkpoint answers."""

    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ServerCase(CaseBase):
    """Judge the answers of a live OpenAI-compatible server, whole and streamed."""

    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    """In OpenAI's form, but for pictures among the parts of a content: see `ImagePart`."""
    tools: str | tuple[dict[str, Any], ...] = ()
    """A key of the suite's `toolsets`, or tools in OpenAI's form."""
    tool_choice: Literal["auto", "none", "required"] | str | None = None
    """Another text names the function that must be called; absent: not sent."""
    thinking: bool | None = None
    """`enable_thinking` among the request's `chat_template_kwargs`; absent: not sent."""
    response_schema: dict[str, Any] | None = None
    """JSON Schema that the content must follow: `response_format` of type `json_schema`."""
    max_tokens: int = Field(default=256, ge=1)
    stop: tuple[str, ...] = ()
    """The same is asked without them first: one of them must be in that answer's content."""
    top_logprobs: int | None = Field(default=None, ge=1, le=20)
    """Ask for log-probabilities, with so many alternatives."""
    cut: float | None = Field(default=None, gt=0, lt=1)
    """Ask again with `max_tokens` at this part of the tokens that the whole answer took."""
    beside: tuple[str | Neighbour, ...] = ()
    """Messages of other users, asked at the same time."""
    instead: tuple[Picture, ...] = ()
    """Ask again with these in place of the pictures, in their order: the answer must be another one, and the
    prompt take as many tokens more or fewer as the sizes of the pictures say."""
    turn_by_turn: bool = False
    """Ask first what was asked earlier in the conversation, as a client does whose conversation grows; the
    last answer must be another one than those."""
    adapter: bool = False
    """Ask for the scripted checkpoint's adapter, by its name in the place of the model's; `beside` still asks
    for the model. The answer must be another one than the model's. For targets that serve it."""
    copies: int = Field(default=1, ge=1, le=16)
    """How many times this request and each of `beside` are asked at the same time."""
    override: dict[str, Any] = Field(default_factory=dict)
    """Keys of the request's body that are replaced as they stand here; null leaves one out."""
    refused: bool = False
    """The request is bad: the answer must be a 4xx with an error object, and the next request answered."""
    produces: tuple[Construct, ...] = ()
    """What must appear for the case to say anything; without it the verdict is `inconclusive`."""
    exact: ExactAnswer | None = None
    """Judged only where the endpoint's model is called `scripted`."""
    keep: tuple[str, ...] = ()
    """Texts that must come out in some field of a contested answer, judged as `exact` is."""

    @model_validator(mode="after")
    def _fits_together(self) -> ServerCase:
        pictures = [part.image for message in self.messages for part in image_parts(message)]
        broken = not all(picture.whole for picture in pictures)
        if self.refused and not (self.override or broken):
            raise ValueError(
                "`refused` needs an `override`, or a damaged picture, that makes the request a bad one"
            )
        if broken and not self.refused:
            raise ValueError("a damaged picture must be `refused: true`")
        if self.instead and len(self.instead) != len(pictures):
            raise ValueError(f"`instead` has {len(self.instead)} pictures for {len(pictures)}")
        if not self.refused and not self.produces:
            raise ValueError("state in `produces` what must appear for the case to say anything")
        if self.copies > 1 and not self.beside:
            raise ValueError("`copies` needs `beside`: equal requests cannot be told apart")
        modes = [
            name
            for name in ("cut", "stop", "beside", "instead", "turn_by_turn", "refused")
            if getattr(self, name)
        ]
        if len(modes) > 1:
            raise ValueError(f"`{modes[0]}` and `{modes[1]}` are two cases")
        if self.adapter and modes not in ([], ["beside"]):
            raise ValueError(f"`adapter` and `{modes[0]}` are two cases")
        return self


def image_parts(message: Mapping[str, Any]) -> Iterator[ImagePart]:
    """The pictures in a message, in order.

    Raises:
        ValidationError: one is in no such form.
    """
    content = message.get("content")
    for part in content if isinstance(content, list | tuple) else ():
        if is_image(part):
            yield ImagePart.model_validate(part)


def is_image(part: Any) -> bool:
    """Whether a part of a content is a picture to be sent."""
    return isinstance(part, dict) and part.get("type") == "image"


class RandomAdapter(Strict):
    """A LoRA adapter with seeded random weights, none of them zero."""

    seed: int = 0
    rank: int = Field(default=4, ge=1)
    scale: float = Field(default=0.1, gt=0)
    """Of what it adds to each weight, relative to the weight's own norm."""
    modules: tuple[str, ...] = Field(min_length=1)
    """Ends of the names of the modules it is for, such as `q_proj`."""


class RandomDraft(Strict):
    """An Eagle3 draft head with seeded random weights: its proposals are bad, the answers must not be."""

    seed: int = 0
    tokens: int = Field(default=3, ge=1)
    """Proposed at a time."""
    layers: tuple[int, ...] = Field(min_length=1)
    """After how many of the checkpoint's layers the states are taken that the head reads."""


class GenerationCase(CaseBase):
    """Judge what a target generates from a checkpoint that says lines of a script by heart."""

    lines: tuple[CaseId, ...] = ()
    """Lines to ask for, all in one batch; empty: all of the script, or none beside `pictures`."""
    pictures: tuple[PicturePrompt, ...] = ()
    """Messages with pictures, in the same batch."""
    causal_images: bool = False
    """With a copy of the checkpoint whose configuration lets soft tokens see only those before them, as those
    of E2B and E4B do."""
    asked: Literal["alone", "thinking", "tools", "system", "all"] = "alone"
    """What stands around the message that asks for a line."""
    copies: int = Field(default=1, ge=1, le=16)
    """How many times each of them is asked."""
    dtype: DType = "float32"
    attention: str | None = None
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    kv_dtype: KVDType | None = None
    """In which keys and values are stored; absent: in `dtype`."""
    eagle3: RandomDraft | None = None
    adapter: RandomAdapter | None = None
    max_new_tokens: int = Field(default=160, ge=1)
    """Where an answer is longer, it must break off there, with the finish reason `length`."""
    top_logprobs: int = Field(default=5, ge=0, le=20)
    tolerance: float = Field(default=1e-3, gt=0)
    """How far a log-probability may be from the oracle's, in float32."""
    factor: float = Field(default=3.0, ge=1)
    """Log-probabilities may be this many times as far from the float32 oracle as those of the oracle itself
    are, at most, if it computes and stores keys and values in the dtypes that are asked for. Where it
    computes in float32 and stores something narrower, they may be half as far from its own."""

    def options(self, draft: str | None = None) -> EngineOptions:
        """How the target is set up, with the folder of the draft head where there is one."""
        speculation = None
        if self.eagle3 is not None:
            speculation = Speculation(method="eagle3", checkpoint=draft or "", tokens=self.eagle3.tokens)
        return EngineOptions(
            dtype=self.dtype,
            attention=self.attention,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            kv_dtype=self.kv_dtype,
            speculation=speculation,
        )


class ToolsSuiteBase(SuiteBase):
    """Head of a suite whose cases declare tools."""

    toolsets: dict[CaseId, tuple[dict[str, Any], ...]] = Field(default_factory=dict)


class ParserSuite(ToolsSuiteBase):
    """Suite of kind `parser`."""

    kind: Literal["parser"]
    cases: tuple[ParserCase, ...] = Field(min_length=1)


class TemplateSuite(ToolsSuiteBase):
    """Suite of kind `template`."""

    kind: Literal["template"]
    cases: tuple[TemplateCase, ...] = Field(min_length=1)


class ParitySuite(SuiteBase):
    """Suite of kind `parity`."""

    kind: Literal["parity"]
    oracle: OracleSpec
    configs: dict[CaseId, dict[str, Any]] = Field(min_length=1)
    """With the keys of a published `text_config`; for rows with media, of a published `config.json`."""
    cases: tuple[ParityCase, ...] = Field(min_length=1)


class MaskSuite(SuiteBase):
    """Suite of kind `mask`."""

    kind: Literal["mask"]
    configs: dict[CaseId, dict[str, Any]] = Field(min_length=1)
    """As in a suite of kind `parity`."""
    cases: tuple[MaskCase, ...] = Field(min_length=1)


class ProcessorSuite(SuiteBase):
    """Suite of kind `processor`."""

    kind: Literal["processor"]
    oracle: OracleSpec
    cases: tuple[ProcessorCase, ...] = Field(min_length=1)


class ServerSuite(ToolsSuiteBase):
    """Suite of kind `server`."""

    kind: Literal["server"]
    cases: tuple[ServerCase, ...] = Field(min_length=1)


class GenerationSuite(SuiteBase):
    """Suite of kind `generation`."""

    kind: Literal["generation"]
    checkpoint: Literal["scripted"]
    """A checkpoint that comes with the bundled implementation."""
    cases: tuple[GenerationCase, ...] = Field(min_length=1)


AnySuite = (
    ParserSuite
    | TemplateSuite
    | ParitySuite
    | MaskSuite
    | ContractSuite
    | ProcessorSuite
    | ServerSuite
    | GenerationSuite
    | InvarianceSuite
    | LoraSuite
    | AccuracySuite
    | ScoringSuite
)
Suite = Annotated[AnySuite, Field(discriminator="kind")]
Case = (
    ParserCase
    | TemplateCase
    | ParityCase
    | MaskCase
    | ContractCase
    | ProcessorCase
    | ServerCase
    | GenerationCase
    | InvarianceCase
    | LoraCase
    | AccuracyCase
    | ScoringCase
)
