"""Write the documents' images of report and live page, by a headless Chromium: python tests/demo_screenshots.py.

It needs a ledger in models/ledger, and its report; `page` or `report` behind the command makes only these.
"""

import io
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, ViewportSize, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:7860"
COLORS = 256  # of a screenshot's palette
DESKTOP: ViewportSize = {"width": 1280, "height": 1230}
PHONE: ViewportSize = {"width": 390, "height": 1690}


def save(screenshot: bytes, name: str) -> None:
    """Write a screenshot with a small palette, by which it is a third as large."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(ROOT / "images" / name, optimize=True)


def shoot_report(browser: Browser) -> None:
    """Write the report's first part."""
    page = browser.new_page(viewport={"width": 1000, "height": 2050})
    page.goto((ROOT / "evaluation_folder" / "report" / "report.html").as_uri())
    save(page.screenshot(), "report.png")


def shoot_page(browser: Browser) -> None:
    """Write the live page as it opens, on a desktop and on a phone."""
    server = subprocess.Popen([sys.executable, ROOT / "eval-scripts" / "demo.py"])
    try:
        while True:
            try:
                urllib.request.urlopen(ADDRESS).close()
                break
            except OSError:
                time.sleep(0.2)
        for viewport, name in ((DESKTOP, "page.png"), (PHONE, "page-phone.png")):
            page = browser.new_page(viewport=viewport)
            page.goto(ADDRESS)
            page.wait_for_selector("#others >> text=Changes on other prompts")
            page.wait_for_timeout(1500)  # until the images are shown
            if viewport is DESKTOP:
                page.locator("#others summary").click()
            save(page.screenshot(), name)
    finally:
        server.terminate()


def main() -> None:
    shots = {"report": shoot_report, "page": shoot_page}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name in sys.argv[1:] or shots:
            shots[name](browser)
        browser.close()


if __name__ == "__main__":
    main()
