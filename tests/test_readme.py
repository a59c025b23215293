"""README.md says what is true: its examples run, CI executes its commands, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/index.md",
    "docs/numerics.md",
    "docs/discrete.md",
]


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line number of the first line, code) of each fenced Python block."""
    blocks = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        blocks.append((text.count("\n", 0, match.start(1)) + 1, match.group(1)))
    return blocks


@pytest.mark.parametrize(
    ("page", "least", "prints"),
    [("README.md", 10, "a logit is NaN"), ("docs/discrete.md", 2, "network calls instead of 256")],
)
def test_examples_run_in_order(
    page: str, least: int, prints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / page
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    assert len(blocks) >= least
    namespace: dict[str, Any] = {"__name__": "__main__"}  # a module that can be imported, as torch 2.6 does
    for line, code in blocks:
        # Empty lines in front give tracebacks the page's line numbers. The name is no file's: torch 2.6's
        # compiler would read that file as Python.
        exec(compile("\n" * (line - 1) + code, f"<{page}>", "exec"), namespace)
    assert prints in capsys.readouterr().out


def test_ci_executes_the_commands_shown() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    marked = re.findall(r"^<!-- ci:(\w+) -->\n```sh\n", README, re.MULTILINE)
    assert {"run", "test", "compile"} <= set(marked)
    assert set(re.findall(r"^readme (\w+)$", script, re.MULTILINE)) == set(marked)


def test_commands_shown_exist() -> None:
    from driftmax import cli

    shown = set(re.findall(r"driftmax (bench|doctor|compile|\w+) --|`driftmax (\w+)`", README))
    names = {a or b for a, b in shown}
    assert {"bench", "compile", "doctor"} <= names
    for name in names:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0, name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert missing == []
