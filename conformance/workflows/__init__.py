"""The matrix as workflows of CI systems: install, run a shard of cells, upload, merge, publish.

Every tier becomes one file, and the rest of a night another one. What it runs are commands of this
harness, so that a job can be repeated by hand; the folder of the environment is `$VENV`, by default `.venv`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conformance.matrix import MatrixFile, Tier

System = Literal["github", "buildkite"]

_ACTIONS = {
    "checkout": ("11bd71901bbe5b1630ceea73d27597364c9af683", "v4.2.2"),
    "setup-python": ("a26af69be951a213d495a4c3e4e4022e16d87065", "v5.6.0"),
    "upload-artifact": ("ea165f8d65b6e75b540449e92b4886f43607fa02", "v4.6.2"),
    "download-artifact": ("d3f86a106a0bac45b974a628896c90dbdf5c8093", "v4.3.0"),
    "cache/restore": ("5a3ec84eff668545956fd18022155c47e93e2684", "v4.2.3"),
    "cache/save": ("5a3ec84eff668545956fd18022155c47e93e2684", "v4.2.3"),
    "upload-pages-artifact": ("56afc609e74202658d3ffba0e8f6dda462b719fa", "v3.0.1"),
    "deploy-pages": ("d6db90164ac5ed86f2b6aed7e0febac5b3c0c03e", "v4.0.5"),
}
"""GitHub's own actions, pinned by their commits: a tag can be moved."""
_LIMITS = {"suites_minutes": 80, "cells_minutes": 350, "cell_seconds": 1800}
"""Of a job, and of one cell in it. A cell that hangs must leave the others of its shard their time."""


def render(system: System, file: MatrixFile) -> dict[str, str]:
    """The workflows of all tiers.

    Args:
        system: For which CI system.
        file: The matrix.

    Returns:
        Path below `ci/` to text.
    """
    env = Environment(  # noqa: S701  # YAML, from templates and names that the matrix's model has checked
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pinned = {name: f"actions/{name}@{commit}  # {version}" for name, (commit, version) in _ACTIONS.items()}
    env.globals.update(actions=pinned, **_LIMITS)
    template = env.get_template(f"{system}.yml.j2")
    prepare = env.get_template("prepare.yml.j2").render().rstrip("\n") if system == "github" else ""
    made = {
        f"{system}/matrix-{name}.yml": template.render(
            prepare=prepare, histories=_histories(name, tier, file), **_values(name, tier)
        )
        for name, tier in file.tiers.items()
    }
    nightly = [name for name, tier in file.tiers.items() if tier.trigger == "nightly"]
    if nightly:
        night = env.get_template(f"nightly.{system}.yml.j2")
        made[f"{system}/nightly.yml"] = night.render(prepare=prepare, tier=nightly[0])
    return made


def _values(name: str, tier: Tier) -> dict[str, str | int | bool]:
    return {"tier": name, "shards": tier.shards, "trigger": tier.trigger, "publish": tier.publish}


def _histories(name: str, tier: Tier, file: MatrixFile) -> list[str]:
    """Tiers whose histories a tier goes on with: its own, else, for a release, that of the nights."""
    nights = [other for other, entry in file.tiers.items() if entry.trigger == "nightly"]
    return [name, *(nights if tier.trigger == "release" else [])]
