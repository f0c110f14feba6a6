"""Write the documents' images of report and live page, by a headless Chromium: python tests/demo_screenshots.py.

It needs a ledger in models/ledger, and its report.
"""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:7860"


def main() -> None:
    server = subprocess.Popen([sys.executable, ROOT / "eval-scripts" / "demo.py"])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 2050})
            page.goto((ROOT / "evaluation_folder" / "report" / "report.html").as_uri())
            page.screenshot(path=ROOT / "images" / "report.png")
            while True:
                try:
                    urllib.request.urlopen(ADDRESS).close()
                    break
                except OSError:
                    time.sleep(0.2)
            page.set_viewport_size({"width": 1100, "height": 760})
            page.goto(ADDRESS)
            page.get_by_label("prompt").fill("VanGogh")
            page.get_by_role("button", name="generate").click()
            page.wait_for_selector("#message >> text=Largest pixel")
            page.wait_for_timeout(1000)
            page.screenshot(path=ROOT / "images" / "page.png")
            browser.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
