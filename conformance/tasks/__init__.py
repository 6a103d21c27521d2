"""Tasks for lm-eval: YAML files in its form, and what reads their documents and their answers.

Whoever imports this, as lm-eval does for a task file of ours, has the model `conformance` among lm-eval's.
"""

import lm_eval.models  # type: ignore[import-untyped]  # noqa: F401 - its own are registered first
from lm_eval.api.registry import model_registry  # type: ignore[import-untyped]

MODEL = "conformance"
"""What lm-eval's `--model` takes for the targets of this harness."""

if MODEL not in model_registry:
    model_registry.register(MODEL, target="conformance.lm_eval_model:ConformanceLM")
