"""Faults of the chat template (catalogue class 3)."""

from __future__ import annotations

from conformance.faults.base import Collection

faults = Collection("template")
