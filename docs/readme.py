"""The numbers in README.md, and its picture of the dashboard: `python docs/readme.py [--picture SITE]`.

Numbers stand between comments, and a test fails when they are not current. The picture is taken of a
folder that `conformance report` or `make run` has written, with Debian's Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from pathlib import Path

from conformance import expectations
from conformance.faults import record, registry
from conformance.loading import LoadedSuites, load_suites
from conformance.targets import environments
from conformance.targets import registry as targets

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "dashboard.png"
BEGIN, END = "<!-- {} written by docs/readme.py -->", "<!-- end -->"
RELEASES = {
    "vllm": ("0.32.0", "vLLM: its parsers and its engine"),
    "vllm-server": ("0.32.0", "vLLM: its OpenAI-compatible server"),
    "sglang-parsers": ("0.8.1", "SGLang's parsers, as llm-router-utils carries them"),
    "transformers": ("5.19.0", "transformers, with its processors and PEFT"),
}
"""The newest release of each engine that the findings are about."""
DOWNLOADS = {
    "vllm": "vLLM's parsers: `{pin}`, PyTorch and what importing the parsers needs",
    "sglang-parsers": "SGLang's parsers: `{pin}`",
    "transformers": "`{pin}` with PyTorch: its parser, and the oracle of the parity suites",
}
"""What the environments of the default targets are for."""


def found() -> str:
    """What there is, and what it found, as Markdown."""
    suites = load_suites()
    kinds = Counter(suite.suite.kind for suite in suites for _ in suite.cases)
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    findings = re.findall(r"^### (F-\d+)", text, re.MULTILINE)
    rows = [
        f"| {what} | {version} | {len(causes)} | {sum(causes.values())} |\n"
        for name, (version, what) in RELEASES.items()
        if (causes := _causes(suites, name, version))
    ]
    noticed = [each.last.detected for each in record.read(record.default_path()).faults]
    return (
        f"There are {sum(kinds.values())} cases in {len(suites.suites)} suites of {len(kinds)} kinds, and "
        f"{len(registry())} faults to switch on. Of the {len(noticed)} on record the quick cases noticed "
        f"{sum(noticed)} (`conformance faults show`).\n"
        f"{len(findings)} causes of failures were found in engines and scorers. These show in the newest "
        "releases, outside the matrix:\n\n"
        "| engine | release | causes | cases that are expected to fail by them |\n"
        f"| --- | --- | --- | --- |\n{''.join(rows)}"
    )


def downloads() -> str:
    """What `make run` installs and how large it is, by the lock files, as Markdown."""
    rows = ["| PyTorch and the harness's own dependencies | `.venv` | |\n"]
    for spec in targets.default_targets():
        if (words := DOWNLOADS.get(spec.partition("@")[0])) is not None:
            lock = environments.find_lock(spec)
            what = words.format(pin="==".join(lock.pins[0]))
            rows.append(f"| {what} | user cache | {lock.megabytes} MB |\n")
    return f"| what | where it goes | installed |\n| --- | --- | --- |\n{''.join(rows)}"


def _causes(suites: LoadedSuites, name: str, version: str) -> Counter[str]:
    """Cases that are known to fail on a release, by the finding that explains them."""
    known = expectations.load(suites)
    found = (known.find(case.address, name, version) for case in suites.cases)
    return Counter(each.entry.finding for each in found if each is not None)


def written(text: str) -> str:
    """README's text with current numbers."""
    for part in (found, downloads):
        begin = BEGIN.format(part.__name__)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(END)
        if not rest or not after:
            raise ValueError(f"{README}: has no {begin} and {END} around what belongs there")
        text = f"{before}{begin}\n{part()}{END}{after}"
    return text


def take(site: Path) -> None:
    """The picture of a dashboard's first page.

    Args:
        site: Its folder.
    """
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        raise FileNotFoundError("the picture needs Chromium on the PATH as `chromium`")
    with sync_playwright() as playwright:
        arguments = ["--headless=new", "--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.goto((site / "index.html").resolve().as_uri())
        page.screenshot(path=PICTURE)
        browser.close()


def main() -> None:
    """Write both, as far as they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--picture", type=Path, metavar="SITE", help="also take the picture of this dashboard"
    )
    site = parser.parse_args().picture
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
    if site is not None:
        take(site)


if __name__ == "__main__":
    main()
