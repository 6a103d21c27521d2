"""Accuracy gates: what a score has to reach, and when enough is known to say so (docs/gates.md).

Records, which import no SciPy: `spec` (what a gate declares), `suite` (cases of kind `accuracy`), `decision`.
From counts to a verdict: `statistics`, `rule`, `planning`, `sequential`, `multiplicity`.
From sheets to a decision: `pairing`, `decide`. Around them: `asking` has a target answer, `baseline` keeps
references, `loading` checks cases, `sensitivity` switches known faults on.
"""
