"""Names in the `capture` of a forward pass. Standard library only: both sides of a worker's pipe read it."""

from __future__ import annotations

LOGITS = "logits"
"""Name under which the logits stand among the tensors of a forward pass."""
MASK = ".mask"
"""End of a name that asks which keys each token sees, behind that of an attention of the text model."""
TOWERS = ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "audio_embedder", "embed_audio")
"""First parts of the names of modules outside the text model."""


def outside_text(name: str) -> bool:
    """Whether a name is that of a module outside the text model."""
    return name.partition(".")[0] in TOWERS
