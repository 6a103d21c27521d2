"""Cutting outputs into chunks, and shrinking a chunking that fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.chunking import FIXED_SIZES, LAGS, MAX_SINGLE_CUTS, chunk_texts, lagging, sampled, shrink
from conformance.targets.protocol import Chunking, Piece
from conformance.tokenization import characters
from conformance.tokenization import pieces as tokens

derandomised = settings(derandomize=True, database=None, deadline=None, max_examples=60)
OUTPUT = '<|channel>thought\nwhy<channel|>Hi 👩‍🚀<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>so'


def plain(count: int, marks: Sequence[int] = ()) -> list[Piece]:
    return [Piece(text=f"{k},", ids=(k,), special=k in marks) for k in range(count)]


def check_cuts(chunking: Chunking, count: int) -> None:
    assert list(chunking.cuts) == sorted(set(chunking.cuts))
    assert all(0 < cut < count for cut in chunking.cuts)


# ---------------------------------------------------------------------------------------- sampled


@given(st.integers(0, 60), st.sets(st.integers(0, 59), max_size=6), st.integers(0, 2**32))
@derandomised
def test_sampled_cuts_are_valid_and_unique(count: int, marks: set[int], seed: int) -> None:
    found = sampled(plain(count, sorted(marks)), "tokens", seed=seed)
    for chunking in found:
        check_cuts(chunking, count)
        assert (chunking.unit, chunking.lag) == ("tokens", 0)
        assert chunking.name
    cuts = [chunking.cuts for chunking in found]
    assert len(set(cuts)) == len(cuts)
    assert set(cuts) >= {(), tuple(range(1, count)), *((k,) for k in range(1, count))}


@pytest.mark.parametrize("unit", ["tokens", "characters"])
def test_sampled_says_its_unit(unit: str) -> None:
    assert {c.unit for c in sampled(plain(5), unit, seed=1)} == {unit}  # type: ignore[arg-type]


def test_sampled_cuts_around_every_marker() -> None:
    cuts = {c.cuts for c in sampled(plain(20, [5, 9]), "tokens", seed=1)}
    for mark in (5, 9):
        assert {
            (mark,),
            (mark + 1,),
            (mark, mark + 1),
            (mark - 1, mark + 1),
            (mark, mark + 2),
            (mark - 1, mark + 2),
        } <= cuts
    assert {(5, 9), (6, 10), (5, 6, 9, 10)} <= cuts


def test_sampled_has_the_fixed_sizes() -> None:
    count = 600
    cuts = {c.cuts for c in sampled(plain(count), "tokens", seed=1)}
    for size in FIXED_SIZES:
        assert tuple(range(size, count, size)) in cuts
        assert tuple(range(1, count, size)) in cuts


def test_long_outputs_keep_the_single_cuts_at_markers() -> None:
    count, marks = 1000, [3, 700, 999]
    singles = {c.cuts[0] for c in sampled(plain(count, marks), "tokens", seed=1) if len(c.cuts) == 1}
    assert {3, 4, 700, 701, count - 1} <= singles
    assert MAX_SINGLE_CUTS <= len(singles) <= MAX_SINGLE_CUTS + 20
    assert max(b - a for a, b in itertools.pairwise(sorted(singles))) < count // 8, "spread over the output"


def test_every_output_up_to_the_limit_has_all_single_cuts() -> None:
    count = MAX_SINGLE_CUTS + 1
    singles = {c.cuts[0] for c in sampled(plain(count), "tokens", seed=1) if len(c.cuts) == 1}
    assert singles == set(range(1, count))


def test_sampled_and_lagging_depend_on_the_seed_alone() -> None:
    pieces = plain(50, [7])
    assert sampled(pieces, "tokens", seed=3) == sampled(pieces, "tokens", seed=3)
    assert sampled(pieces, "tokens", seed=3) != sampled(pieces, "tokens", seed=4)
    assert lagging(pieces, seed=3) == lagging(pieces, seed=3)
    assert lagging(pieces, seed=3) != lagging(pieces, seed=4)


# ---------------------------------------------------------------------------------------- lag


@given(st.integers(0, 40), st.integers(0, 2**32))
@derandomised
def test_lagging_cuts_are_valid_and_unique(count: int, seed: int) -> None:
    found = lagging(plain(count), seed=seed)
    for chunking in found:
        check_cuts(chunking, count)
        assert chunking.cuts, "one chunk has no room for a lag"
        assert chunking.lag in LAGS
    assert len({(c.cuts, c.lag) for c in found}) == len(found)
    if count > 1:
        assert {c.lag for c in found} == set(LAGS)


def test_no_lag_cuts_text_and_ids_alike() -> None:
    pieces = [
        Piece(text="ab", ids=(1,)),
        Piece(text="", ids=(2,)),
        Piece(text="c", ids=(3, 4)),
        Piece(text="d", ids=(5,)),
    ]
    assert chunk_texts(pieces, Chunking(name="x", cuts=(1, 3))) == [
        ("ab", (1,)),
        ("c", (2, 3, 4)),
        ("d", (5,)),
    ]
    assert chunk_texts(pieces, Chunking(name="x")) == [("abcd", (1, 2, 3, 4, 5))]
    assert chunk_texts([], Chunking(name="x")) == [("", ())]


def test_lagging_text_stays_behind_its_ids() -> None:
    pieces = [Piece(text=c, ids=(k,)) for k, c in enumerate("abcdef")]

    def texts(lag: int, *cuts: int) -> list[str]:
        chunks = chunk_texts(pieces, Chunking(name="x", cuts=cuts, lag=lag))
        assert [len(ids) for _, ids in chunks] == [b - a for a, b in itertools.pairwise([0, *cuts, 6])], (
            "ids do not lag"
        )
        return [text for text, _ in chunks]

    assert texts(1, 1, 2, 3, 4, 5) == ["", "a", "b", "c", "d", "ef"]
    assert texts(2, 3, 5) == ["a", "bc", "def"]
    assert texts(100, 1, 2) == ["", "", "abcdef"]
    assert texts(0, 3) == ["abc", "def"]


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(0, 40), st.booleans())
@derandomised
def test_chunks_put_together_are_the_output(cuts: list[int], lag: int, by_token: bool) -> None:
    cut = tokens(OUTPUT) if by_token else characters(OUTPUT)
    chunking = Chunking(name="x", cuts=tuple(sorted({c for c in cuts if c < len(cut)})), lag=lag)
    chunks = chunk_texts(cut, chunking)
    assert len(chunks) == len(chunking.cuts) + 1
    assert "".join(text for text, _ in chunks) == OUTPUT
    assert [i for _, ids in chunks for i in ids] == [i for p in cut for i in p.ids]
    shown = itertools.accumulate(len(text) for text, _ in chunks)
    ready = [len("".join(p.text for p in cut[:k])) for k in chunking.cuts]
    for number, (so_far, there) in enumerate(zip(shown, ready, strict=False)):
        assert so_far == max(0, there - lag), number


# ---------------------------------------------------------------------------------------- shrinking

Rule = Callable[[Chunking], bool]
RULES: dict[str, Rule] = {
    "one cut": lambda c: 7 in c.cuts,
    "two cuts": lambda c: {3, 11} <= set(c.cuts),
    "either cut": lambda c: 3 in c.cuts or 17 in c.cuts,
    "neighbours": lambda c: any(b - a == 1 for a, b in itertools.pairwise(c.cuts)),
    "three cuts": lambda c: len(c.cuts) >= 3,
    "last": lambda c: 19 in c.cuts,
    "always": lambda c: True,
    "odd number": lambda c: len(c.cuts) % 2 == 1,
}


def judged(rule: Rule, log: list[Chunking] | None = None) -> Callable[[Sequence[Chunking]], list[bool]]:
    def fails(chunkings: Sequence[Chunking]) -> list[bool]:
        assert chunkings, "nothing to judge"
        if log is not None:
            log.extend(chunkings)
        return [rule(chunking) for chunking in chunkings]

    return fails


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("cuts", [tuple(range(1, 20)), (3, 4, 7, 11, 17, 18, 19)])
def test_shrink_finds_a_minimal_chunking(rule: Rule, cuts: tuple[int, ...]) -> None:
    start = Chunking(name="all", cuts=cuts)
    assert rule(start), "a rule that the start does not break tests nothing"
    smallest = shrink(start, judged(rule))
    assert rule(smallest)
    for k in range(len(smallest.cuts)):
        fewer = smallest.model_copy(update={"cuts": smallest.cuts[:k] + smallest.cuts[k + 1 :]})
        assert not rule(fewer), f"{smallest.cuts} is not minimal"


@pytest.mark.parametrize(
    ("rule", "cuts"),
    [
        ("one cut", (7,)),
        ("two cuts", (3, 11)),
        ("last", (19,)),
        ("always", ()),
        ("odd number", 1),
        ("three cuts", 3),
    ],
)
def test_shrink_finds_the_smallest_there_is(rule: str, cuts: tuple[int, ...] | int) -> None:
    smallest = shrink(Chunking(name="all", cuts=tuple(range(1, 20))), judged(RULES[rule]))
    assert (len(smallest.cuts) if isinstance(cuts, int) else smallest.cuts) == cuts


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda c: c.lag >= 4, ((), 4)),
        (lambda c: c.lag >= 4 and 2 in c.cuts, ((2,), 4)),
        (lambda c: c.lag + len(c.cuts) >= 5, ((), 5)),
        (lambda c: 2 in c.cuts, ((2,), 0)),
        # Less lag is possible only with fewer cuts, and the other way round.
        (lambda c: c.lag == 9 - len(c.cuts) or c.lag >= 12, ((), 9)),
    ],
)
def test_shrink_lessens_the_lag_too(rule: Rule, expected: tuple[tuple[int, ...], int]) -> None:
    smallest = shrink(Chunking(name="all", cuts=(1, 2, 3, 4), lag=12), judged(rule))
    assert (smallest.cuts, smallest.lag) == expected


def test_shrink_leaves_what_is_already_smallest() -> None:
    start = Chunking(name="one", cuts=(7,), unit="characters")
    assert shrink(start, judged(RULES["one cut"])) is start
    whole = Chunking(name="whole")
    assert shrink(whole, judged(RULES["always"])) is whole
    shrunk = shrink(Chunking(name="all", unit="characters", cuts=(6, 7)), judged(RULES["one cut"]))
    assert (shrunk.name, shrunk.unit) == ("shrunk", "characters")


def test_shrink_asks_little() -> None:
    log: list[Chunking] = []
    shrink(Chunking(name="all", cuts=tuple(range(1, 1000))), judged(lambda c: 500 in c.cuts, log))
    assert len(log) < 25_000
