"""What the harness asks of a target: request and answer types, and the `Target` protocol.

1. Every type here is JSON in and JSON out, so one request runs in process or across a pipe.
2. A target answers what its engine says. Judging, trimming and comparing is the checks' work.
3. A target that lacks a capability says so in `TargetInfo.capabilities`; it is then never asked.
4. An engine's exception is raised as `EngineError`; a dead worker as `WorkerDiedError`; a missed
   deadline as `TargetTimeoutError`. Nothing else leaves a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from conformance.targets.base import Capability as Capability
from conformance.targets.base import Choice as Choice
from conformance.targets.base import DType as DType
from conformance.targets.base import Feature as Feature
from conformance.targets.base import KVDType as KVDType
from conformance.targets.base import Model as Model
from conformance.targets.generation import EngineOptions as EngineOptions
from conformance.targets.generation import GenerateRequest as GenerateRequest
from conformance.targets.generation import GenerateResult as GenerateResult
from conformance.targets.generation import Generation as Generation
from conformance.targets.generation import Loglikelihood as Loglikelihood
from conformance.targets.generation import LoglikelihoodRequest as LoglikelihoodRequest
from conformance.targets.generation import LoglikelihoodResult as LoglikelihoodResult
from conformance.targets.generation import Parts as Parts
from conformance.targets.generation import Sampling as Sampling
from conformance.targets.generation import Speculation as Speculation
from conformance.worker.modules import MASK

if TYPE_CHECKING:
    from conformance.targets.stages import StagesRequest, StagesResult

MediaKind = Literal["image", "video", "audio"]
MediaForm = Literal["tower", "unified"]
"""What the media are prepared for: the towers, or the encoder-free 12B."""
LongBlocks = Literal["drop", "clamp_past", "clamp_both"]
"""What becomes of an image longer than the window: attended to causally; the window hides keys too far in
the past; it hides keys too far on either side."""

PieceUnit = Literal["tokens", "characters"]
AttentionBackend = Literal["eager", "sdpa", "flex"]


class TargetInfo(Model):
    """Who answers: shown on the dashboard and kept in the run's header."""

    name: str
    """Registry name, such as `vllm`."""
    version: str
    """Version of the engine itself, such as `0.32.0`, as read inside its environment."""
    capabilities: tuple[Capability, ...]
    stream_unit: PieceUnit = "tokens"
    """Finest cut the engine's own streaming interface can meet: `characters` where it takes text
    alone, `tokens` where it takes token ids with the text."""
    search_feeds: int = 0
    """Longest search for a certificate, in feeds, that an ordinary run asks for: it depends on what copying
    this engine's parser costs, and is fixed so that a verdict does not depend on the machine's speed."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Package versions and platform facts that may change a verdict."""
    features: tuple[Feature, ...] = ()
    """What it can be asked for in a `GenerateRequest` or a `ForwardRequest`."""
    choices: dict[Choice, tuple[str, ...]] = Field(default_factory=dict)
    """Of what it has several, by its own names for them."""
    unavailable: dict[Capability, str] = Field(default_factory=dict)
    """Capabilities that this installation could have and has not, and what to do about it."""
    note: str = ""
    """What exactly is driven, e.g. the entry point's dotted name."""


class Piece(Model):
    """One unit of a finished output: a token with the text it adds, or a single character.

    A token's text may be empty (it holds part of a character that the next token completes).
    A character's `ids` is empty.
    """

    text: str
    ids: tuple[int, ...] = ()
    special: bool = False
    """True for a control token of the vocabulary. Plain text that merely spells a marker is False."""


class ParseRequest(Model):
    """A finished model output, and what the engine's serving layer would know about it."""

    output: str
    """The generated text, markers included (`skip_special_tokens=False`)."""
    pieces: tuple[Piece, ...]
    """`output` cut into tokens; the texts concatenate to `output`."""
    prompt: str
    """Rendered prompt that was answered; its tail decides the parser's first state."""
    prompt_ids: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Declared tools in OpenAI's form: `{"type": "function", "function": {...}}`."""
    thinking: bool | None = None
    """`enable_thinking` of the request; None when the client left it out."""
    tool_choice: Literal["auto", "none"] = "auto"


class ToolCall(Model):
    """One call of a whole (not streamed) answer."""

    name: str
    arguments: str
    """JSON text, as an OpenAI server would send it."""


class Span(Model):
    """A stretch of the output and what became of it: `[start, end)` in characters."""

    start: int
    end: int
    role: Literal["reasoning", "content", "call_name", "call_arguments", "marker", "dropped"]
    reason: str = ""
    """Why the text was dropped; empty for the other roles."""


class ParseResult(Model):
    """What the engine makes of a whole output. None and "" both mean that a field is absent."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    spans: tuple[Span, ...] | None = None
    """Where every character went, from targets that can tell."""


class ToolCallDelta(Model):
    """Part of a call in a stream, merged by `index` as OpenAI clients do."""

    index: int
    id: str | None = None
    type: str | None = None
    name: str | None = None
    arguments: str | None = None


class Delta(Model):
    """One streamed message of the engine."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Chunking(Model):
    """How a stream is cut: chunk k ends after piece `cuts[k]`; the last chunk ends the output.

    `lag` holds the text back by that many characters behind its token ids, as detokenisers do;
    the rest comes with the last chunk.
    """

    name: str
    unit: PieceUnit = "tokens"
    cuts: tuple[int, ...] = ()
    """Strictly increasing piece counts, each in 1..n-1. Empty: everything in one chunk."""
    lag: int = 0


class StreamRequest(Model):
    """The same output, streamed several times from a fresh parser."""

    request: ParseRequest
    chunkings: tuple[Chunking, ...]


class StreamResult(Model):
    """What came out of one chunking: all deltas in order, or the error that ended it."""

    deltas: tuple[Delta, ...] = ()
    error: str | None = None
    """`Type: message` when the parser raised; the deltas before it are kept."""


class CertifyRequest(Model):
    """Visit every chunking of the output by merging equal parser states."""

    request: ParseRequest
    unit: PieceUnit
    max_states: int = 100_000
    max_seconds: float = 5.0


class Outcome(Model):
    """One distinct streamed result, and the smallest chunking that led to it."""

    result: ParseResult
    cuts: tuple[int, ...]
    chunkings: str
    """How many of the 2^(n-1) chunkings end here, as a decimal string (it outgrows 64 bits)."""
    error: str | None = None
    ragged: bool = False
    """The merged call indices were not 0..n-1 in order of appearance."""


class Certificate(Model):
    """Result of a search over all chunkings."""

    unit: PieceUnit
    pieces: int
    states: int
    """Distinct (position, parser state, output so far) triples visited."""
    complete: bool
    """False: a limit was met or the state is opaque; the outcomes prove nothing then."""
    reason: str = ""
    """Why the search is not complete."""
    outcomes: tuple[Outcome, ...] = ()


class RenderRequest(Model):
    """Messages to prompt."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool | None = None
    """None: the flag is omitted from the template's variables."""
    add_generation_prompt: bool = True
    preserve_thinking: bool | None = None
    family: Literal["large", "e"] = "large"
    """Which official template: 12B/26B/31B (`large`) or E2B/E4B (`e`)."""


class RenderResult(Model):
    """The prompt as text, with its ids where the target tokenises."""

    prompt: str
    token_ids: tuple[int, ...] | None = None


class MediaFile(Model):
    """An image, a video or a sound."""

    kind: MediaKind
    path: str
    """An encoded image or sound. A video is decoded already, as decoders differ: a safetensors file with
    `frames`, uint8 [F, 3, height, width]."""
    fps: float | None = None
    """Frames a second of a video, where it says."""


class PreprocessRequest(Model):
    """A rendered prompt and its media, to what the model reads."""

    form: MediaForm
    prompt: str
    """With one placeholder (`<|image|>`, `<|video|>`, `<|audio|>`) for each piece of media."""
    media: tuple[MediaFile, ...]
    """In the order of the prompt."""
    image_budget: int = 280
    """Most soft tokens of an image."""
    frame_budget: int = 70
    """Most soft tokens of a video's frame."""
    sample_frames: bool = True
    """Take 32 frames of each video; else all."""
    output: str
    """Path of the safetensors file that the target writes."""


class PreprocessResult(Model):
    """The prompt with a placeholder for each soft token, and tensors in a file.

    The tensors' names and shapes, with N pieces padded behind to one length:
    `image.pixels` float32 [N, P, values] and `image.positions` int64 [N, P, 2] (column, row; -1 at padding);
    `video.pixels` and `video.positions` likewise, all frames of all videos one after the other, with
    `video.frames` int64 [videos]; `audio.features` float32 [N, T, values] and `audio.mask` bool [N, T].
    There is none for a kind of which there is no piece.
    """

    path: str
    prompt: str


class ForwardRequest(Model):
    """Rows of token ids to the tensors inside a model.

    Every row is fed up to `prefill` tokens in one call, and then one token a step with the cache.
    """

    checkpoint: str
    """Folder with `config.json` and `model.safetensors`, under the published names."""
    dtype: DType = "float32"
    """Of weights and activations."""
    input_ids: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """Rows, which may differ in length; none is empty. Padding is the target's own affair."""
    prefill: int | None = Field(default=None, ge=1)
    """None: each row in one call."""
    media: str = ""
    """Path of a safetensors file as `PreprocessResult` describes it: what the placeholders among the ids
    stand for, row by row. Empty: there is nothing but text, and the checkpoint may be a text model's."""
    capture: tuple[str, ...] = ()
    """Modules whose output is wanted: those of the text model by their published names below
    `model.language_model.`, such as `layers.3.self_attn`, the others by theirs below `model.`, such as
    `vision_tower.encoder.layers.0`; `logits`; and with `.mask` behind an attention of the text model, such as
    `layers.3.self_attn.mask`, which keys each token sees."""
    attention: AttentionBackend | None = None
    """Backend of the text model. None: the target's choice."""
    long_blocks: LongBlocks | None = None
    """None: the target's choice."""
    output: str
    """Path of the safetensors file that the target writes."""

    @model_validator(mode="after")
    def _no_empty_row(self) -> ForwardRequest:
        if not all(self.input_ids):
            raise ValueError("a row of token ids is empty")
        if self.prefill is not None and any(name.endswith(MASK) for name in self.capture):
            raise ValueError("masks are recorded of one pass over whole rows; leave `prefill` out")
        return self


class ForwardResult(Model):
    """Tensors in a file, and what really ran.

    Each captured module has a float32 tensor `[tokens, ...]`: all rows one after the other, without
    padding, each row's steps joined in time. Where a module gives several tensors, it is the first one;
    for `router`, the weight of each expert, `[tokens, experts]`, zero where a token does not go; for a mask,
    `[tokens, longest row]`, one where the token sees the key of that place in its row, else zero.

    Outside the text model there are no rows: `[patches, ...]`, `[frames, ...]` or `[soft tokens, ...]` of all
    images, then those of all frames of videos, or of all sounds, in the order of the prompts.
    """

    path: str
    order: tuple[str, ...] = ()
    """The captured names in the order in which the modules ended, as far as they ran."""
    effective: dict[str, str] = Field(default_factory=dict)
    """`attention`, `experts` (where there are any) and `dtype`, read back from the model. With media also
    `image_calls`, `video_calls` and `audio_calls`, how many times a tower ran for pieces of that kind, and
    `rows`: `one by one` where rows do not run together."""


class ServeRequest(Model):
    """Chat completions to ask for, all at the same time, each over a connection of its own."""

    bodies: tuple[dict[str, Any] | str, ...] = Field(min_length=1)
    """Bodies in OpenAI's form; the target adds `model` where it is missing. A text is sent as it is."""


ServeFailure = Literal[
    "", "redirect", "timeout", "too-large", "connection", "malformed", "key-echoed", "budget"
]


class ServeAnswer(Model):
    """What a server sent back for one body."""

    status: int | None = None
    """HTTP status; None where no answer began."""
    failure: ServeFailure = ""
    """Why there is no whole answer: a redirect (never followed), a limit of time or size, a connection that
    broke, an answer that is not what its content type says, the key in the answer, or no request left."""
    detail: str = ""
    """The failure in one sentence."""
    body: Any = None
    """The JSON of an answer that is not a stream."""
    events: tuple[dict[str, Any], ...] | None = None
    """The JSON of each event of a stream, in order; None where the answer is not a stream."""
    done: bool = False
    """The stream ended with `[DONE]`."""


@runtime_checkable
class Target(Protocol):
    """An implementation under test.

    `spec`, `describe` and `close` are needed. Of the other methods, those that `describe` names as
    capabilities: the rest is never called and may be left out (`conformance.targets.registry.describe`
    checks it). A class that inherits from this one still has to write each method that it names itself.
    """

    spec: str
    """How the user names it: `reference`, `vllm@0.32.0`."""

    def describe(self) -> TargetInfo:
        """Name, versions, capabilities."""
        ...

    def parse(self, request: ParseRequest) -> ParseResult:
        """Parse a whole output."""
        ...

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        """Parse the output once per chunking; one result each, in order."""
        ...

    def certify(self, request: CertifyRequest) -> Certificate:
        """Search all chunkings."""
        ...

    def render(self, request: RenderRequest) -> RenderResult:
        """Render messages to a prompt; a conversation the template refuses raises `EngineError`."""
        ...

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        """Prepare media; what it refuses raises `EngineError`."""
        ...

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Run the model of a checkpoint; a request that it refuses raises `EngineError`."""
        ...

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Greedy answers to prompts; a request or an option that it refuses raises `EngineError`."""
        ...

    def loglikelihood(self, request: LoglikelihoodRequest) -> LoglikelihoodResult:
        """Likelihoods of given continuations; what it refuses raises `EngineError`."""
        ...

    def stages(self, request: StagesRequest) -> StagesResult:
        """Run the model in stages, and tell what crosses between them."""
        ...

    def close(self) -> None:
        """Release processes and files. Safe to call twice."""
        ...


@runtime_checkable
class Server(Protocol):
    """The method of a target with the capability `serve`, which as a rule has none of the others."""

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        """Ask the server; one answer for each body, in order. What goes wrong is in the answers."""
        ...
