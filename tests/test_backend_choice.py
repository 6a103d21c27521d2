"""Which attention backend serves which member of the family, and the exact words of each refusal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model_impl.errors import ModelError
from model_impl.layers.backend_choice import (
    BackendChoice,
    BackendError,
    BackendRequest,
    refusals,
    resolve_backend,
    why_not,
)
from model_impl.layers.backend_table import CAPABILITY_TABLE, Capability, Device, Engine, HeadSizes, Reach


@dataclass(frozen=True)
class Model:
    head_dims: tuple[int, ...]
    bidirectional_images: bool = False


def pattern(sliding: int, blocks: int) -> tuple[int, ...]:
    return ((256,) * sliding + (512,)) * blocks


FAMILY = {
    "E2B": Model(pattern(4, 7)),
    "E4B": Model(pattern(5, 7)),
    "12B": Model(pattern(5, 8), bidirectional_images=True),
    "26B-A4B": Model(pattern(5, 5), bidirectional_images=True),
    "31B": Model(pattern(5, 10), bidirectional_images=True),
}
ROWS = {row.name: row for row in CAPABILITY_TABLE}
AMPERE, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 6), (9, 0), (10, 0), (12, 0)


def vllm(device: Device = "cuda", **fields: object) -> BackendRequest:
    request = BackendRequest("vllm", device=device, compute_capability=HOPPER if device == "cuda" else None)
    return replace(request, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- the table

NO_MASKS = "has no masks under which an image's tokens see each other"
UP_TO_256 = "has no head size 512 (it has 1 to 256)"

# Each backend where it is at home, asked for by name: why it cannot serve text, and why not images whose
# tokens attend bidirectionally. None: it serves.
AT_HOME: dict[str, tuple[BackendRequest, str | None, str | None]] = {
    "sdpa": (BackendRequest(), None, None),
    "eager": (BackendRequest(), None, None),
    "flex": (BackendRequest(), None, None),
    "FLASH_ATTN": (
        vllm(),
        "has no head size 512 (it has 8 to 256 in steps of 8)",
        f"has no head size 512 (it has 8 to 256 in steps of 8), {NO_MASKS}",
    ),
    "FLASH_ATTN_FA4": (vllm(fa4_available=True), None, None),
    "TRITON_ATTN": (vllm(), None, None),
    "FLASHINFER": (vllm(), None, NO_MASKS),
    "FLEX_ATTENTION": (vllm(), None, None),
    "CPU_ATTN": (vllm("cpu"), None, NO_MASKS),
    "ROCM_ATTN": (vllm("rocm"), UP_TO_256, f"{UP_TO_256}, {NO_MASKS}"),
    "ROCM_AITER_UNIFIED_ATTN": (vllm("rocm"), None, NO_MASKS),
    "HPC_ATTN": (
        vllm(),
        "has no head sizes 256 and 512 (it has 128)",
        f"has no head sizes 256 and 512 (it has 128), {NO_MASKS}",
    ),
    "B12X": (vllm(compute_capability=CONSUMER_BLACKWELL), UP_TO_256, f"{UP_TO_256}, {NO_MASKS}"),
}
IMAGE_MASKS = {
    "sdpa": "clamped",
    "eager": "clamped",
    "flex": "clamped",
    "FLASH_ATTN_FA4": "clamped",
    "TRITON_ATTN": "clamped",
    "FLEX_ATTENTION": "unclamped",
}
# Without FlashAttention 4, by device and whether image masks are needed.
ALTERNATIVES = {
    ("cuda", False): "can serve: TRITON_ATTN, FLASHINFER, FLEX_ATTENTION",
    ("cuda", True): "can serve: TRITON_ATTN, FLEX_ATTENTION",
    ("rocm", False): "can serve: TRITON_ATTN, ROCM_AITER_UNIFIED_ATTN",
    ("rocm", True): "can serve: TRITON_ATTN",
    ("cpu", True): "no backend of this engine can serve it",
}


def test_every_row_has_its_answers() -> None:
    assert list(AT_HOME) == list(ROWS)
    assert len(ROWS) == len(CAPABILITY_TABLE), "two rows of one name"


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("backend", AT_HOME)
def test_each_backend_on_each_member_of_the_family(backend: str, member: str, images: bool) -> None:
    home, text_refusal, image_refusal = AT_HOME[backend]
    model = FAMILY[member]
    request = replace(home, backend=backend, images=images)
    masks = model.bidirectional_images and images
    refusal = image_refusal if masks else text_refusal

    if refusal is None:
        choice = resolve_backend(model, request)
        assert choice.backends == (backend,) * len(model.head_dims)
        assert choice.image_masks == (IMAGE_MASKS[backend] if masks else "none")
        assert choice.reason == f"{backend} was asked for and serves head sizes 256 and 512"
    else:
        with pytest.raises(BackendError) as caught:
            resolve_backend(model, request)
        assert str(caught.value) == f"{backend} {refusal}; {ALTERNATIVES[home.device, masks]}"


@pytest.mark.parametrize(
    ("backend", "served", "unserved"),
    [
        ("sdpa", (1, 10, 256, 513), ()),
        ("eager", (1, 10, 256, 513), ()),
        ("flex", (1, 10, 256, 513), ()),
        ("FLASH_ATTN", (8, 72, 256), (4, 100, 252, 264, 512)),
        ("FLASH_ATTN_FA4", (64, 256, 512), (513, 1024)),
        ("TRITON_ATTN", (32, 33, 512, 1024), (16, 31)),
        ("FLASHINFER", (64, 128, 256, 512), (32, 96, 192, 257)),
        ("FLEX_ATTENTION", (1, 10, 256, 513), ()),
        ("CPU_ATTN", (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512), (16, 48, 144, 384)),
        ("ROCM_ATTN", (64, 256), (257, 512)),
        ("ROCM_AITER_UNIFIED_ATTN", (32, 512), (16, 31)),
        ("HPC_ATTN", (128,), (64, 256)),
        ("B12X", (64, 256), (257, 512)),
    ],
)
def test_head_sizes_of_each_row(backend: str, served: tuple[int, ...], unserved: tuple[int, ...]) -> None:
    sizes = ROWS[backend].reach.head_sizes
    assert [size for size in served if size not in sizes] == []
    assert [size for size in unserved if size in sizes] == []


@pytest.mark.parametrize("row", CAPABILITY_TABLE, ids=lambda row: row.name)
def test_the_column_of_mixed_sizes_agrees_with_that_of_head_sizes(row: Capability) -> None:
    """The sheet's column speaks of 256 and 512 in one model."""
    both = 256 in row.reach.head_sizes and 512 in row.reach.head_sizes
    assert row.reach.mixed_head_sizes == both
    assert "fact sheet section 10" in row.source


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "ROCM_ATTN", "B12X"])
def test_a_backend_that_cannot_mix_serves_one_size_at_a_time(backend: str) -> None:
    request = replace(AT_HOME[backend][0], backend=backend)
    for size in (128, 256):
        assert resolve_backend(Model((size, size)), request).backend == backend
    with pytest.raises(BackendError, match=rf"^{backend} cannot mix head sizes 128 and 256; can serve: "):
        resolve_backend(Model((128, 256)), request)


DEVICES: dict[str, set[Device]] = {
    "sdpa": {"cpu", "cuda"},
    "eager": {"cpu", "cuda"},
    "flex": {"cpu", "cuda"},
    "TRITON_ATTN": {"cuda", "rocm"},
    "CPU_ATTN": {"cpu"},
    "ROCM_ATTN": {"rocm"},
    "ROCM_AITER_UNIFIED_ATTN": {"rocm"},
}


@pytest.mark.parametrize("device", get_args(Device))
@pytest.mark.parametrize("backend", ROWS)
def test_devices_of_each_row(backend: str, device: Device) -> None:
    row = ROWS[backend]
    gpu = row.oldest_gpu if device == "cuda" else None
    request = BackendRequest(row.engine, device=device, compute_capability=gpu, fa4_available=True)
    refusal = why_not(row, [128], request, image_masks=False)
    if device in DEVICES.get(backend, {"cuda"}):
        assert refusal is None
    else:
        assert refusal == f"runs on {' or '.join(row.devices)}, not on {device}"


@pytest.mark.parametrize(
    ("backend", "runs", "not_on"),
    [
        ("FLASH_ATTN", [(8, 0), HOPPER, BLACKWELL, (12, 1)], [(7, 5)]),
        ("FLASH_ATTN_FA4", [HOPPER, BLACKWELL, (11, 0)], [(8, 9), (12, 0)]),
        ("TRITON_ATTN", [(7, 0), AMPERE, (12, 1)], []),
        ("FLASHINFER", [(8, 0), HOPPER, (12, 1)], [(7, 5), (12, 2)]),
        ("FLEX_ATTENTION", [(7, 0), (12, 1)], []),
        ("HPC_ATTN", [HOPPER], [(8, 9), BLACKWELL]),
        ("B12X", [(12, 0), (12, 1)], [HOPPER, (11, 0)]),
    ],
)
def test_gpus_of_each_row(backend: str, runs: list[tuple[int, int]], not_on: list[tuple[int, int]]) -> None:
    def refusal(gpu: tuple[int, int]) -> str | None:
        request = vllm(compute_capability=gpu, fa4_available=True)
        return why_not(ROWS[backend], [128], request, image_masks=False)

    assert [gpu for gpu in runs if refusal(gpu)] == []
    for major, minor in not_on:
        assert refusal((major, minor)) == f"does not run on compute capability {major}.{minor}"


# ---------------------------------------------------------------------------- none asked for


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        (BackendRequest(), "sdpa"),
        (BackendRequest(device="cuda"), "sdpa"),
        (vllm(fa4_available=True), "FLASH_ATTN_FA4"),
        (vllm(), "TRITON_ATTN"),
        (vllm(fp8_kv_cache=True), "TRITON_ATTN"),
        (vllm(compute_capability=AMPERE), "TRITON_ATTN"),
        (vllm(compute_capability=AMPERE, fa4_available=True), "TRITON_ATTN"),
        (vllm(compute_capability=BLACKWELL, fa4_available=True, fp8_kv_cache=True), "FLASH_ATTN_FA4"),
        (vllm("rocm"), "TRITON_ATTN"),
    ],
)
def test_two_head_sizes_force_one_backend(
    request_: BackendRequest, chosen: str, member: str, images: bool
) -> None:
    model = FAMILY[member]
    choice = resolve_backend(model, replace(request_, images=images))
    assert choice.backends == (chosen,) * len(model.head_dims)
    assert choice.backend == chosen
    assert choice.image_masks == ("clamped" if model.bidirectional_images and images else "none")


def test_the_reason_names_what_was_passed_over() -> None:
    assert resolve_backend(FAMILY["E2B"], BackendRequest()).reason == (
        "sdpa is the first automatic backend of reference that serves head sizes 256 and 512"
    )
    assert resolve_backend(FAMILY["E2B"], vllm()).reason == (
        "TRITON_ATTN is the first automatic backend of vllm that serves head sizes 256 and 512 "
        "(FLASH_ATTN has no head size 512 (it has 8 to 256 in steps of 8); "
        "FLASH_ATTN_FA4 needs FlashAttention 4, which is not available)"
    )


def test_heads_above_512_go_to_triton() -> None:
    choice = resolve_backend(Model((256, 576)), vllm(fa4_available=True, fp8_kv_cache=True))
    assert choice.backends == ("TRITON_ATTN", "TRITON_ATTN")


def test_one_small_head_size_leaves_flash_attention_2_or_3() -> None:
    assert resolve_backend(Model((256, 256)), vllm(fa4_available=True)).backend == "FLASH_ATTN"


@pytest.mark.parametrize("member", FAMILY)
def test_an_fp8_cache_on_hopper_shares_out_the_layers(member: str) -> None:
    model = FAMILY[member]
    choice = resolve_backend(model, vllm(fa4_available=True, fp8_kv_cache=True))
    expected = {256: "FLASH_ATTN", 512: "FLASH_ATTN_FA4"}
    assert choice.backends == tuple(expected[head_dim] for head_dim in model.head_dims)
    assert choice.image_masks == "none"
    assert choice.reason == (
        "with an fp8 KV cache on compute capability 9.x the head size of a layer decides: "
        "FLASH_ATTN for 256, FLASH_ATTN_FA4 for 512"
    )
    with pytest.raises(BackendError, match="layers have different backends"):
        _ = choice.backend


@pytest.mark.parametrize("member", FAMILY)
def test_an_fp8_cache_on_hopper_sends_image_masks_to_triton(member: str) -> None:
    model = FAMILY[member]
    choice = resolve_backend(model, vllm(fa4_available=True, fp8_kv_cache=True, images=True))
    if model.bidirectional_images:
        assert choice.backend == "TRITON_ATTN"
        assert choice.image_masks == "clamped"
    else:
        assert set(choice.backends) == {"FLASH_ATTN", "FLASH_ATTN_FA4"}


def test_one_size_is_not_shared_out_and_needs_no_fa4() -> None:
    request = vllm(fa4_available=True, fp8_kv_cache=True)
    small = resolve_backend(Model((256, 256)), request)
    assert small.backend == "FLASH_ATTN"
    assert small.reason == "FLASH_ATTN is the first automatic backend of vllm that serves head size 256"
    assert resolve_backend(Model((512, 512)), request).backend == "FLASH_ATTN_FA4"
    assert resolve_backend(Model((128, 256)), replace(request, fa4_available=False)).backend == "TRITON_ATTN"


def test_fa4_alone_cannot_serve_an_fp8_cache_on_hopper() -> None:
    request = vllm(fa4_available=True, fp8_kv_cache=True, images=True, backend="FLASH_ATTN_FA4")
    hopper_fp8 = " with an fp8 KV cache on compute capability 9.x"
    with pytest.raises(BackendError) as caught:
        resolve_backend(FAMILY["31B"], request)
    assert str(caught.value) == (
        f"FLASH_ATTN_FA4 has no head size 256 (it has 257 to 512{hopper_fp8}), {NO_MASKS}{hopper_fp8}; "
        "can serve: TRITON_ATTN, FLEX_ATTENTION"
    )


def test_vllm_on_a_cpu_serves_text_and_refuses_bidirectional_images() -> None:
    assert resolve_backend(FAMILY["31B"], vllm("cpu")).backend == "CPU_ATTN"
    assert resolve_backend(FAMILY["E4B"], vllm("cpu", images=True)).backend == "CPU_ATTN"
    with pytest.raises(BackendError) as caught:
        resolve_backend(FAMILY["31B"], vllm("cpu", images=True))
    assert str(caught.value) == (
        "vllm has no automatic attention backend for head sizes 256 and 512 "
        "(FLASH_ATTN runs on cuda, not on cpu; FLASH_ATTN_FA4 runs on cuda, not on cpu; "
        f"TRITON_ATTN runs on cuda or rocm, not on cpu; CPU_ATTN {NO_MASKS}); "
        "no backend of this engine can serve it"
    )


def test_what_no_automatic_backend_serves_names_those_that_do() -> None:
    with pytest.raises(BackendError, match=r"; can serve: FLEX_ATTENTION$"):
        resolve_backend(Model((10, 18)), vllm())


# ---------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            BackendRequest(backend="flash"),
            "reference has no attention backend 'flash'; known: sdpa, eager, flex",
        ),
        (
            BackendRequest(backend="TRITON_ATTN"),
            "reference has no attention backend 'TRITON_ATTN'; known: sdpa, eager, flex",
        ),
        (
            vllm(backend="sdpa"),
            (
                "vllm has no attention backend 'sdpa'; known: FLASH_ATTN, FLASH_ATTN_FA4, TRITON_ATTN, "
                "FLASHINFER, FLEX_ATTENTION, CPU_ATTN, ROCM_ATTN, ROCM_AITER_UNIFIED_ATTN, HPC_ATTN, B12X"
            ),
        ),
    ],
)
def test_an_unknown_backend_is_refused_with_the_known_ones(request_: BackendRequest, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        resolve_backend(FAMILY["E2B"], request_)
    assert str(caught.value) == message
    assert isinstance(caught.value, ModelError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "sglang"}, "engine 'sglang' is unknown; known: reference, vllm"),
        ({"device": "tpu"}, "device 'tpu' is unknown; known: cpu, cuda, rocm"),
        ({"engine": "vllm", "device": "cuda"}, "give its compute_capability"),
        ({"compute_capability": HOPPER}, "compute_capability is for device 'cuda', not 'cpu'; leave it out"),
        ({"fp8_kv_cache": True}, "the reference keeps no fp8 KV cache"),
    ],
)
def test_a_request_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        BackendRequest(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dims", [(), (256, 0), (-1,)])
def test_layers_without_a_head_size_are_refused(head_dims: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="each layer needs a head dimension of 1 or more"):
        resolve_backend(Model(head_dims), BackendRequest())


def test_the_table_is_an_argument() -> None:
    own = Capability(
        "mine",
        "reference",
        Reach(HeadSizes(only=(24,)), mixed_head_sizes=False, image_masks="none"),
        devices=("cpu",),
        source="this test",
        automatic=True,
    )
    assert resolve_backend(Model((24, 24)), BackendRequest(), [own]).backend == "mine"
    with pytest.raises(BackendError, match="mine has no head size 32"):
        resolve_backend(Model((32,)), BackendRequest(), [own])


# ---------------------------------------------------------------------------- for every model and request

MODELS = st.builds(
    Model,
    st.lists(st.sampled_from([8, 16, 32, 64, 100, 128, 256, 264, 512, 576]), min_size=1, max_size=6).map(
        tuple
    ),
    st.booleans(),
)
SETTINGS = {"images": st.booleans(), "fa4_available": st.booleans()}
REQUESTS = st.one_of(
    st.builds(BackendRequest, device=st.sampled_from(get_args(Device)), **SETTINGS),
    st.builds(
        BackendRequest,
        engine=st.just("vllm"),
        device=st.just("cuda"),
        compute_capability=st.sampled_from([(7, 5), AMPERE, HOPPER, BLACKWELL, (11, 0), CONSUMER_BLACKWELL]),
        fp8_kv_cache=st.booleans(),
        **SETTINGS,
    ),
    st.builds(
        BackendRequest,
        engine=st.just("vllm"),
        device=st.sampled_from(["cpu", "rocm"]),
        fp8_kv_cache=st.booleans(),
        **SETTINGS,
    ),
)


def outcome(model: Model, request: BackendRequest) -> BackendChoice | str:
    try:
        return resolve_backend(model, request)
    except BackendError as error:
        return str(error)


@given(MODELS, REQUESTS, st.sampled_from([None, *ROWS]))
def test_the_choice_is_a_function_of_its_arguments(
    model: Model, request: BackendRequest, backend: str | None
) -> None:
    request = replace(request, backend=backend)
    assert outcome(model, request) == outcome(replace(model), replace(request))


@given(MODELS, REQUESTS)
def test_what_is_chosen_serves_every_layer(model: Model, request: BackendRequest) -> None:
    choice = outcome(model, request)
    assume(isinstance(choice, BackendChoice))
    assert isinstance(choice, BackendChoice)
    masks = model.bidirectional_images and request.images
    assert len(choice.backends) == len(model.head_dims)
    for backend, head_dim in zip(choice.backends, model.head_dims, strict=True):
        row = ROWS[backend]
        assert row.engine == request.engine
        assert request.device in row.devices
        assert head_dim in row.reach.head_sizes
        assert row.reach.image_masks != "none" or not masks
    assert (choice.image_masks != "none") == masks
    if len(set(choice.backends)) > 1:
        assert request.hopper_fp8
        assert request.fa4_available


@given(MODELS, REQUESTS)
def test_the_refused_are_exactly_those_that_are_not_served(model: Model, request: BackendRequest) -> None:
    known = {name for name, row in ROWS.items() if row.engine == request.engine}
    refused = refusals(model, request)
    assert refused.keys() <= known
    serving = [name for name in ROWS if name in known - refused.keys()]
    for name in known:
        answer = outcome(model, replace(request, backend=name))
        if name in refused:
            assert isinstance(answer, str)
            assert answer.startswith(f"{name} {refused[name]}; ")
            named = answer.rpartition("; can serve: ")[2].split(", ") if "; can serve: " in answer else []
            assert named == serving
        else:
            assert isinstance(answer, BackendChoice)
            assert answer.backends == (name,) * len(model.head_dims)


@given(MODELS, REQUESTS)
def test_none_is_chosen_only_where_every_automatic_one_is_refused(
    model: Model, request: BackendRequest
) -> None:
    automatic = {name for name, row in ROWS.items() if row.automatic and row.engine == request.engine}
    if isinstance(outcome(model, request), str):
        assert automatic <= refusals(model, request).keys()


@pytest.mark.parametrize("engine", get_args(Engine))
def test_each_engine_has_an_automatic_backend(engine: Engine) -> None:
    assert any(row.automatic for row in CAPABILITY_TABLE if row.engine == engine)
