"""A headless Chromium, driven over the protocol of its own chromedriver. Standard library only."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
).split()


class Browser:
    """A window with a page in it."""

    def __init__(self, width=1280, height=1000, dark=False):
        self.profile = tempfile.mkdtemp(prefix="rheap-browser-")
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        port = next(m[1] for m in (re.search(r"successfully on port (\d+)", line) for line in self.driver.stdout) if m)
        self.url = f"http://127.0.0.1:{port}"
        arguments = [*FLAGS, f"--user-data-dir={self.profile}", f"--window-size={width},{height}"]
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        wanted = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": arguments},
        }
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += "/session/" + session["sessionId"]

    def ask(self, method, path, body=None):
        request = urllib.request.Request(
            self.url + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # A proxy of the environment's is not for the own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, path):
        url = f"file://{path}"
        self.ask("POST", "/url", {"url": url})
        # On a busy machine the driver may answer for the page before, or for one whose scripts have not run yet.
        deadline = time.monotonic() + 60
        while self.run("return [location.href, document.readyState]") != [url, "complete"]:
            assert time.monotonic() < deadline, f"{url} does not load"
            time.sleep(0.02)

    def run(self, script, *arguments):
        """Runs the body of a JavaScript function; returns what it returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def command(self, name, **parameters):
        """A command of the browser's own protocol."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def narrow(self, width, height):
        """As on a phone: a window cannot be that narrow."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=True)

    def wide(self):
        """As it was before `narrow`."""
        self.command("Emulation.clearDeviceMetricsOverride")

    def prefer(self, scheme):
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def find(self, css):
        """Waits until it is there: what a click makes the page do may come a moment later."""
        self.ask("POST", "/timeouts", {"implicit": 20_000})
        [element] = self.ask("POST", "/element", {"using": "css selector", "value": css}).values()
        return element

    def click(self, css):
        # As a reader would, clear of what sticks to the top.
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", css)
        self.ask("POST", f"/element/{self.find(css)}/click", {})

    def keys(self, css, text):
        self.ask("POST", f"/element/{self.find(css)}/value", {"text": text})

    def log(self):
        """What the page has written to the console since the last call, errors of its own included."""
        return self.ask("POST", "/se/log", {"type": "browser"})

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.ask("GET", "/screenshot")))

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(30)
            self.driver.stdout.close()
            shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
