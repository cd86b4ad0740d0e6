"""A headless browser for pages from a file: what it made of them, what it complained about, what it asked for."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OWN_HOSTS = (None, "clients2.google.com", "accounts.google.com", "www.google.com", "update.googleapis.com")
"""What a browser without a page asks by itself; no name is looked up all the same."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """``dom``: as the browser has it; ``console``: its complaints; ``asked``: addresses that the page made it load."""

    dom: str
    console: list[str]
    asked: list[str]


def show(page: Path, *, width: int = 1280, dark: bool = False) -> Shown:
    """Open a page. A request of the page's own would be in ``asked``, refused or not."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        net_log = Path(folder) / "net.json"
        done = subprocess.run(
            [BROWSER, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},2000",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
             f"--log-net-log={net_log}", "--dump-dom", page.resolve().as_uri()],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        events = json.loads(net_log.read_text())["events"]
    asked = {str(event["params"]["url"]) for event in events if "url" in event.get("params", {})}
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Shown(done.stdout, console, sorted(url for url in asked if urlsplit(url).hostname not in OWN_HOSTS))
