"""Questions about generated pictures and sounds, for nano checkpoints to learn and to be examined on."""

from model_impl.nano.subjects.exercise import Exercise, Subject
from model_impl.nano.subjects.figures import FIGURES
from model_impl.nano.subjects.hearing import listening
from model_impl.nano.subjects.scattered import SCATTERED
from model_impl.nano.subjects.seeing import glance, glimpse
from model_impl.nano.subjects.telling import reciting, telling
from model_impl.nano.subjects.tones import RHYTHM, TONES

SUBJECTS: tuple[Subject, ...] = (*SCATTERED, *FIGURES)
"""Ten kinds of questions about pictures."""
SOUND_SUBJECTS: tuple[Subject, ...] = TONES
"""Two about sounds."""

__all__ = [
    "RHYTHM",
    "SOUND_SUBJECTS",
    "SUBJECTS",
    "Exercise",
    "Subject",
    "glance",
    "glimpse",
    "listening",
    "reciting",
    "telling",
]
