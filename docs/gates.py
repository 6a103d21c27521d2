"""The tables of docs/gates.md, written from the record of sensitivity: `python docs/gates.py [--check]`.

They stand between two comments. With `--check` nothing is written, and the exit code is 1 if they are not
those of the record. Whether the record still holds is another question: `conformance gate check-sensitivity`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conformance.gates import record, sensitivity

GUIDE = Path(__file__).with_name("gates.md")
BEGIN, END = "<!-- written by docs/gates.py -->", "<!-- end -->"
CHECKPOINTS = {
    "nano-d": "a model without per-layer inputs and experts",
    "nano-a": "with experts",
    "nano-e": "with per-layer inputs, whose images are seen causally",
}
MODES = ("long-images-dropped", "future-clamped")
"""Faults that treat an image which is longer than the window in another way."""
LONG_IMAGES = "accuracy/nano::mmmu-nano-d"


def tables(found: record.SensitivityFile) -> str:
    """All of them, in Markdown, with what they say together."""
    gates = list(dict.fromkeys(cell.case for cell in found.cells))
    parts = [record.where_from(found)]
    for checkpoint, what in CHECKPOINTS.items():
        own = [gate for gate in gates if gate.endswith(checkpoint)]
        parts.append(f"`conformance gate sensitivity 'accuracy/nano::*{checkpoint}'`, {what}:")
        parts.append(record.table(found, sensitivity.FAULTS, own).rstrip())
    parts.append(f"`conformance gate sensitivity {LONG_IMAGES}`, with faults of long images:")
    parts.append(record.table(found, MODES, [LONG_IMAGES], tensors=False).rstrip())
    caught = noticed(found)
    parts.append(f"So gates alone notice {len(caught)} of the {len(sensitivity.FAULTS)} by their scores.")
    return "\n\n".join(parts) + "\n"


def noticed(found: record.SensitivityFile) -> set[str]:
    """The usual faults that some gate fails by its score."""
    return {
        cell.fault
        for cell in found.cells
        if cell.fault in sensitivity.FAULTS and cell.told.verdict == "fail" and not cell.told.by_words_alone
    }


def written(text: str, found: record.SensitivityFile) -> str:
    """The guide's text with the record's tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise ValueError(f"{GUIDE}: has no {BEGIN} and {END} around its tables")
    return f"{before}{BEGIN}\n\n{tables(found)}\n{END}{after}"


def main() -> int:
    """Write them, or say whether they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if they differ")
    check = parser.parse_args().check
    text = GUIDE.read_text(encoding="utf-8")
    new = written(text, record.read(record.default_path()))
    if not check:
        GUIDE.write_text(new, encoding="utf-8")
    return int(check and new != text)


if __name__ == "__main__":
    raise SystemExit(main())
