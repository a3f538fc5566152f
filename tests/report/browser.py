"""A page in headless Chromium: how wide it becomes, what it says on the console, and a picture of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# A window cannot be as narrow as a phone, a frame can.
FRAME = """<!DOCTYPE html><style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<iframe src="{url}"></iframe><script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument.documentElement;
  document.title = JSON.stringify([page.scrollWidth, page.clientWidth, page.scrollHeight]);
}}</script>"""


@dataclass(frozen=True)
class Shown:
    """What came of a page: widths and height in pixels, and what the console said."""

    scroll_width: int
    width: int
    height: int
    console: list[str]


def show(page: Path, width: int, picture: Path, folder: Path, *, dark: bool = False) -> Shown:
    """Open ``page`` so wide, and leave a picture of all of it in ``picture``."""
    first = _run(page, width, 800, folder, dark, "--dump-dom")
    title = re.search(r"<title>(\[.*?\])", first.stdout)
    assert title, first.stderr
    scroll_width, inner, height = json.loads(title[1])
    second = _run(page, width, height, folder, dark, f"--screenshot={picture}")
    said = [line for line in (first.stderr + second.stderr).splitlines() if "CONSOLE" in line]
    return Shown(scroll_width, inner, height, said)


def screenshots() -> Path:
    """Return where pictures stay after the tests."""
    folder = Path(os.environ.get("MKA_TEST_SCREENSHOTS") or Path(tempfile.gettempdir()) / "mka-export-screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(page: Path, width: int, height: int, folder: Path, dark: bool, *what: str) -> subprocess.CompletedProcess[str]:
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(url=page.as_uri(), width=width, height=height))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files"]
    command += [
        f"--window-size={max(width, 520)},{height}",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]
    return subprocess.run([*command, *what, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
