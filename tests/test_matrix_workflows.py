"""The workflows of CI: as the matrix says, valid, and their steps really run in a clean clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from conformance import matrix, resources, workflows
from conformance.cli import invoke
from tests.conftest import ROOT

BELOW = resources.ci_dir()
SYSTEMS: tuple[workflows.System, ...] = ("github", "buildkite")
ONE = """
title: One cheap cell, and one that needs what is not here
targets:
  reference: {}
checkpoints:
  scripted: {cases: ["generation/scripted::one-alone"]}
axes:
  attention:
    own: {}
    cuda-attn: {attention: FLASH_ATTN, needs: cuda}
  layout:
    single: {}
tiers:
  pr: {strength: 2, trigger: pull-request}
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_committed_workflows_are_those_of_the_matrix(system: workflows.System) -> None:
    """If this fails: conformance matrix render github && conformance matrix render buildkite."""
    made = workflows.render(system, matrix.load().file)
    assert {f"{system}/{path.name}" for path in (BELOW / system).iterdir()} == set(made)
    for name, text in made.items():
        assert (BELOW / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("system", "schema"), [("github", "github-workflows"), ("buildkite", "buildkite")])
def test_workflows_follow_the_schema_of_their_system(system: str, schema: str) -> None:
    files = sorted(map(str, (BELOW / system).glob("*.yml")))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(files) == 4


def test_a_shard_that_is_not_in_the_workflow_is_none_of_the_matrix() -> None:
    """The jobs of a tier are all of its shards, once each."""
    for tier, entry in matrix.load().file.tiers.items():
        github = yaml.safe_load((BELOW / f"github/matrix-{tier}.yml").read_text())
        cells = github["jobs"]["cells"]
        assert cells["strategy"]["matrix"]["shard"] == list(range(1, entry.shards + 1))
        assert any(f'"$SHARD/{entry.shards}"' in step.get("run", "") for step in cells["steps"])
        buildkite = yaml.safe_load((BELOW / f"buildkite/matrix-{tier}.yml").read_text())
        assert buildkite["steps"][1]["parallelism"] == entry.shards


def test_only_a_tier_that_is_published_may_write() -> None:
    for tier, entry in matrix.load().file.tiers.items():
        github = yaml.safe_load((BELOW / f"github/matrix-{tier}.yml").read_text())
        assert github["permissions"] == {"contents": "read"}
        writes = {name for name, job in github["jobs"].items() if "permissions" in job}
        assert writes == ({"publish"} if entry.publish else set())
        for job in github["jobs"].values():
            for step in job["steps"]:
                action = step.get("uses", "x@" + 40 * "0").split("#")[0].strip()
                assert len(action.partition("@")[2]) == 40, "actions are pinned by their commits"
                assert "${{" not in step.get("run", ""), "values reach a shell through its environment"


def merge_steps(tier: str) -> list[dict]:
    """The steps of the merge on GitHub."""
    return yaml.safe_load((BELOW / f"github/matrix-{tier}.yml").read_text())["jobs"]["merge"]["steps"]


def test_the_history_is_kept_whatever_fails_after_the_merge() -> None:
    """The one step that may find fault before the history is saved is the merge, which keeps what it can."""
    for tier, entry in matrix.load().file.tiers.items():
        found = merge_steps(tier)
        names = [step["name"] for step in found]
        kept, merged = names.index("Keep the history"), names.index("Merge the run files into the history")
        assert kept == merged + 1
        assert all("!cancelled()" in step["if"] for step in found[kept:])
        assert found[kept]["uses"].startswith("actions/cache/save@")
        fetched = found[names.index("Fetch the history")]
        assert fetched["uses"].startswith("actions/cache/restore@")
        assert fetched["with"]["key"] == found[kept]["with"]["key"]
        known = ["history-release-", "history-nightly-"] if tier == "release" else [f"history-{tier}-"]
        assert fetched["with"]["restore-keys"].split() == known
        job = yaml.safe_load((BELOW / f"github/matrix-{tier}.yml").read_text())["jobs"]["merge"]
        assert ("CONFORMANCE_DATABASE" in job.get("env", {})) == (entry.trigger != "pull-request")


def test_what_a_job_did_is_kept_when_it_is_over_its_time() -> None:
    """Its long step is ended before the job is, and what there is is uploaded even from a cancelled job."""
    for tier in matrix.load().file.tiers:
        jobs = yaml.safe_load((BELOW / f"github/matrix-{tier}.yml").read_text())["jobs"]
        for name in ("suites", "cells"):
            *_, ran, uploaded = jobs[name]["steps"]
            assert ran["timeout-minutes"] <= jobs[name]["timeout-minutes"] - 20
            assert uploaded["if"] == "${{ always() }}"
        fetched = [step["with"] for step in merge_steps(tier) if "download-artifact" in step.get("uses", "")]
        assert ["pattern" in options and "name" not in options for options in fetched] == [True, True]
        steps_ = yaml.safe_load((BELOW / f"buildkite/matrix-{tier}.yml").read_text())["steps"]
        for step, minutes in zip(steps_, ("60m", "300m"), strict=False):
            assert f"--kill-after=60 {minutes} " in step["command"][-1]
            assert int(minutes.removesuffix("m")) < step["timeout_in_minutes"]


def test_what_a_night_did_is_kept_when_it_is_over_its_time() -> None:
    job = yaml.safe_load((BELOW / "github/nightly.yml").read_text())["jobs"]["night"]
    names = [step.get("name") for step in job["steps"]]
    ran = names.index("Run the night")
    assert job["steps"][ran]["timeout-minutes"] <= job["timeout-minutes"] - 20
    assert {step["if"] for step in job["steps"][ran + 1 :]} == {"${{ always() }}"}
    (step,) = yaml.safe_load((BELOW / "buildkite/nightly.yml").read_text())["steps"]
    (night,) = [line for line in step["command"] if "ci/nightly" in line]
    assert "--kill-after=60 300m " in night
    assert step["timeout_in_minutes"] > 300


def test_what_is_published_by_a_schedule_does_not_hang_on_what_its_event_says() -> None:
    """The event of a schedule need not name the repository; without it, another event publishes nothing."""
    condition = yaml.safe_load((BELOW / "github/matrix-nightly.yml").read_text())["jobs"]["publish"]["if"]
    first, second, third = condition.removeprefix("${{").removesuffix("}}").strip().split(" && ")
    assert (first, second) == ("!cancelled()", "needs.merge.result != 'skipped'")
    assert third.strip("()").split(" || ") == [
        "github.event_name == 'schedule'",
        "github.ref_name == github.event.repository.default_branch",
    ]


def test_the_night_is_the_script_and_may_write_nothing() -> None:
    """Its cells have a workflow of their own; what it says must reach people whatever its exit code."""
    night = yaml.safe_load((BELOW / "github/nightly.yml").read_text())
    assert night["permissions"] == {"contents": "read"}
    run, said = (step for step in night["jobs"]["night"]["steps"] if "runs/night" in step.get("run", ""))
    assert "\nci/nightly --skip matrix " in run["run"]
    assert '"${CONFORMANCE_DATABASE:-sqlite:///history.sqlite}"' in run["run"], "cells have the same database"
    assert said["if"] == "${{ always() }}"
    assert os.access(BELOW / "nightly", os.X_OK)
    for step in night["jobs"]["night"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert len(step.get("uses", "x@" + 40 * "0").split("#")[0].strip().partition("@")[2]) == 40


@pytest.mark.parametrize(
    ("code", "ends", "warned"), [(0, 0, False), (1, 1, False), (2, 2, False), (3, 0, True)]
)
def test_the_night_of_github_warns_of_what_is_open_and_fails_of_the_rest(
    code: int, ends: int, warned: bool, tmp_path: Path
) -> None:
    night = yaml.safe_load((BELOW / "github/nightly.yml").read_text())
    (run,) = (step for step in night["jobs"]["night"]["steps"] if "ci/nightly" in step.get("run", ""))
    night_script = tmp_path / "ci" / "nightly"
    night_script.parent.mkdir()
    night_script.write_text(f"#!/bin/sh\nexit {code}\n")
    night_script.chmod(0o755)
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", run["run"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "::warning::" in done.stdout) == (ends, warned)


@pytest.mark.parametrize(("code", "annotated"), [(0, 0), (1, 0), (3, 0), (0, 1)])
def test_the_night_of_buildkite_tells_what_it_found_and_ends_as_it_did(
    code: int, annotated: int, tmp_path: Path
) -> None:
    """Its commands are one script there; what models said is no markup of the annotation."""
    (night,) = yaml.safe_load((BELOW / "buildkite/nightly.yml").read_text())["steps"]
    assert night["soft_fail"] == [{"exit_status": 3}]
    night_script = tmp_path / "ci" / "nightly"
    night_script.parent.mkdir()
    night_script.write_text(
        "#!/bin/sh\nmkdir -p runs/night\n"
        f"printf '%s\\n' '# **bold**' \"$@\" > runs/night/nightly.txt\nexit {code}\n"
    )
    agent = tmp_path / "bin" / "buildkite-agent"
    agent.parent.mkdir()
    agent.write_text(f"#!/bin/sh\ncat > told\nexit {annotated}\n")
    (tmp_path / "bin" / "make").write_text("#!/bin/sh\n")
    for program in (night_script, agent, tmp_path / "bin" / "make"):
        program.chmod(0o755)
    # The agent reads `$$` as `$` when a pipeline is uploaded, and runs all commands in one shell.
    script = "\n".join(night["command"]).replace("$$", "$")
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CONFORMANCE_DATABASE": "sqlite:///mine"},
        timeout=60,
        check=False,
    )
    assert done.returncode == (code or annotated)
    told = (tmp_path / "told").read_text().splitlines()
    assert told[0] == "    # **bold**"
    assert all(line.startswith("    ") for line in told)
    assert told[-2:] == ["    --database", "    sqlite:///mine"]


PROGRAM = '#!/bin/sh\necho "$@"\ntest "$1" != targets\n'
"""In place of `conformance`: no target can be installed."""


INSTALLED = [
    "targets install --default",
    "targets install vllm@0.23.0 vllm@0.24.0",
    "nightly -n 2 --spread 3 --skip matrix",
]


def script_of_the_night(cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BELOW / "nightly", "--skip", "matrix"],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name not in ("VENV", "WORKERS", "SPREAD")}
        | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_script_of_the_night_goes_on_without_targets(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    program = binaries / "conformance"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    done = script_of_the_night(tmp_path, VENV=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.splitlines() == INSTALLED
    assert "going on" in done.stderr


def test_the_script_of_the_night_is_told_processes_and_nights(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "conformance").write_text(PROGRAM)
    (binaries / "conformance").chmod(0o755)
    done = script_of_the_night(tmp_path, VENV=str(tmp_path), WORKERS="7", SPREAD="1")
    assert done.stdout.splitlines()[-1] == "nightly -n 7 --spread 1 --skip matrix"


@pytest.mark.parametrize("named", [{}, {"VENV": "elsewhere"}])
def test_the_script_of_the_night_makes_the_environment_that_is_not_there(
    tmp_path: Path, named: dict[str, str]
) -> None:
    """Of a clean clone; `make` is asked, which here writes a program instead of installing one."""
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    stamp = "$(VENV)/.installed:\n\tmkdir -p $(BIN)\n\tcp program $(BIN)/conformance\n"
    text = (
        (tmp_path / "Makefile")
        .read_text()
        .replace("install: $(VENV)/.installed", f"{stamp}install: $(VENV)/.installed")
    )
    rule = text.index("$(VENV)/.installed: $(VENV)/.torch")
    (tmp_path / "Makefile").write_text(text[:rule] + text[text.index("$(VENV)/.installed-dev: ") :])
    done = script_of_the_night(tmp_path, **named)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / named.get("VENV", ".venv") / "bin/conformance").is_file()
    assert done.stdout.splitlines()[-3:] == INSTALLED


def test_the_script_of_the_night_ends_without_an_environment(tmp_path: Path) -> None:
    done = script_of_the_night(tmp_path)
    assert done.returncode == 2
    assert "the environment .venv cannot be made" in done.stderr


# ------------------------------------------------------------------------------------------ a clean clone


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, as they are now, and beside them what `make install` would have made."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60, check=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "ci/matrix.yaml").write_text(ONE)
    binaries = folder / ".prepared" / "bin"
    binaries.mkdir(parents=True)
    program = binaries / "conformance"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" -m conformance "$@"\n')
    program.chmod(0o755)
    for stamp in (".python", ".torch", ".installed"):
        (folder / ".prepared" / stamp).touch()
    return folder


def steps(text: str, job: str) -> Iterator[tuple[str, str]]:
    """Name and command of each `run:` step of a job."""
    for step in yaml.safe_load(text)["jobs"][job]["steps"]:
        if "run" in step:
            yield step["name"], step["run"]


@pytest.fixture(scope="module")
def shell(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_", "PYTHON"))}
    home = tmp_path_factory.mktemp("home")
    variables = kept | {
        "VENV": str(clone / ".prepared"),
        "SHARD": "1",
        "OMP_NUM_THREADS": "1",
        "CONFORMANCE_HOME": str(home),
        "GITHUB_STEP_SUMMARY": str(clone / "summary.md"),
    }

    def run(command: str) -> str:
        # As GitHub does on Linux.
        arguments = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
        done = subprocess.run(
            arguments, cwd=clone, env=variables, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_the_steps_of_a_cell_and_of_the_merge_run_in_a_clean_clone(
    clone: Path, shell: Callable[[str], str]
) -> None:
    text = workflows.render("github", matrix.load(clone / "ci/matrix.yaml").file)["github/matrix-pr.yml"]
    names = []
    for name, command in steps(text, "cells"):
        names.append(name)
        shell(command)
    assert names == ["Install the harness", "Install the engines of this shard", "Run its cells"]
    found = sorted(path.name for path in (clone / "runs/cells").iterdir())
    assert found == ["reference+scripted+cuda-attn.jsonl", "reference+scripted.jsonl"]

    # The job `suites` runs all quick cases; here its file comes from one.
    shell(
        '"$VENV/bin/conformance" run parser/typing::nullable-null -t reference --no-report '
        "--out runs/suites/run.jsonl"
    )
    said = {name: shell(command) for name, command in steps(text, "merge")}
    assert list(said) == [
        "Install the harness",
        "Merge the run files into the history",
        "Say what broke",
        "Write the dashboard",
        "Fail if a cell of the tier has no result",
    ]
    assert "    0 broken, 0 still broken, 0 mended, 3 new\n" in said["Say what broke"]
    assert (clone / "summary.md").read_text() == said["Say what broke"]
    assert "2 of 2 cells came to their end" in said["Fail if a cell of the tier has no result"]
    assert (clone / "history.sqlite").is_file()
    page = (clone / "site/matrix.html").read_text()
    assert "reference+scripted+cuda-attn" in page
    assert "needs CUDA" in page
    assert (clone / "site/cells/reference-scripted.html").is_file()


def test_render_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "matrix.yaml").write_text(ONE)
    assert invoke(["matrix", "render", "github", "--matrix", str(tmp_path / "matrix.yaml")]) == 0
    assert (tmp_path / "github/matrix-pr.yml").is_file()
    out = str(tmp_path / "out")
    assert (
        invoke(["matrix", "render", "buildkite", "--matrix", str(tmp_path / "matrix.yaml"), "--out", out])
        == 0
    )
    assert (tmp_path / "out/buildkite/matrix-pr.yml").is_file()
    assert "matrix-pr.yml" in capsys.readouterr().out
