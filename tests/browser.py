"""Find Chromium or Chrome, or bring it: Debian's package as root, else Playwright's own download.

Run as a program, it prints the path of the browser, or says what to install and exits with 1.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
)
DEBIAN = (
    ["apt-get", "update"],
    ["apt-get", "install", "-y", "--no-install-recommends", "chromium"],
)
PLAYWRIGHT = ([sys.executable, "-m", "playwright", "install", "chromium"],)
HELP = (
    "No Chromium or Chrome was found and none could be installed. Install one (Debian and Ubuntu: "
    "'apt-get install chromium' as root; elsewhere: Google Chrome, or 'playwright install chromium') "
    "and run this again."
)


def _playwright() -> str:
    """The path at which Playwright keeps its own Chromium, there or not."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def find() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    found = (shutil.which(name) for name in NAMES)
    present = (place for place in PLACES if Path(place).is_file())
    path = next(filter(None, found), None) or next(present, None)
    if path is None and Path(own := _playwright()).is_file():
        path = own
    return path


def _as_root_on_debian() -> bool:
    system = platform.freedesktop_os_release() if sys.platform == "linux" else {}
    return system.get("ID") == "debian" and os.geteuid() == 0


def ensure() -> str:
    """The path of a browser, which is installed first where there is none.

    Raises:
        RuntimeError: No browser was found and none could be installed; the message says what to install.
    """
    ways = [DEBIAN, PLAYWRIGHT] if _as_root_on_debian() else [PLAYWRIGHT]
    for way in ways:
        if path := find():
            return path
        for command in way:
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                break
    if path := find():
        return path
    raise RuntimeError(HELP)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{ensure()}\n")
    except RuntimeError as error:
        sys.exit(str(error))
