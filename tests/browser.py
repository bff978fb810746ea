"""Runs a page from the disk in headless Chromium, as a visitor would see it, with real time and real playback."""

import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def told_by(page: Path, script: str, folder: Path, *flags: str) -> str:
    """What ``script``, appended to a copy of ``page`` and run when it has loaded, hands to ``tell(text)``.

    ``script`` is the body of an async function; an error in it is told too. Nothing but this process can be reached:
    every other address resolves to nothing.
    """
    told: list[str] = []
    finished = threading.Event()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()
            finished.set()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    tell = f'const tell = text => fetch("{address}", {{method: "POST", mode: "no-cors", body: text}});'
    run = f'addEventListener("load", async () => {{ try {{ {script} }} catch (e) {{ tell("error: " + e); }} }});'
    copy = folder / "page_with_script.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{tell}{run}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
    command += ["--disable-background-networking", "--autoplay-policy=no-user-gesture-required"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", *flags, copy.as_uri()]
    assert CHROMIUM is not None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as chromium:
        try:
            assert finished.wait(60), "the page told nothing"
        finally:
            chromium.terminate()
            server.shutdown()
            server.server_close()
    return told[0]
