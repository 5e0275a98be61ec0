"""A headless Chromium that is spoken to over two pipes, with nothing but the standard library."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Of a page, {element.class: the lowest contrast of its text}, by WCAG 2.2, 1.4.3; disabled buttons may have less.
CONTRAST = """(() => {
const TEXTS = "p, li, a, th, td, dt, dd, span, summary, h1, h2, h3, h4, h5, pre, ins, del, mark, label, kbd, "
  + "button";
const number = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
const found = {};
for (const one of document.querySelectorAll(TEXTS)) {
  if (one.closest("button:disabled")) continue;
  let ground = null, opacity = 1;
  for (let holder = one; holder; holder = holder.parentElement) {
    const style = getComputedStyle(holder), color = number(style.backgroundColor);
    opacity *= style.opacity;
    if (!ground && (color.length < 4 || color[3] > 0)) ground = color;
  }
  const ink = number(getComputedStyle(one).color).map((v, i) => v * opacity + ground[i] * (1 - opacity));
  const [a, b] = [light(ink), light(ground)];
  const name = one.tagName + "." + one.className;
  found[name] = Math.min(found[name] ?? 99, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
}
return found;
})()"""


class Browser:
    """One page at a time; `problems` is what it logged, and `requests` the addresses that it asked for."""

    def __enter__(self) -> "Browser":
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        (commands, self._out), (self._in, answers) = os.pipe(), os.pipe()

        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash"),
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={self._profile}",
                "--remote-debugging-pipe",  # reads from 3 and writes to 4
                "about:blank",
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems, self.requests, self._events = [], [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._out)  # at which it ends
        os.close(self._in)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def view(self, width: int, dark: bool = False) -> None:
        """In a window of so many CSS pixels, as on a phone below 600 of them."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path | str) -> None:
        """A file, or an address."""
        self._events.clear()
        self.send("Page.navigate", url=path if isinstance(path, str) else path.absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._note(self._read())

    def value(self, expression: str) -> Any:
        """Of JavaScript, which a content security policy does not forbid here."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the value is true, for a minute at most."""
        deadline = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """A character, or a key by its name."""
        for kind in ("keyDown", "keyUp"):
            typed = "\r" if key == "Enter" else key if len(key) == 1 else ""
            text = {"text": typed} if typed and kind == "keyDown" else {}
            code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}.get(key, 0)
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method", ""), message.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"].get("text"))
        elif method == "Log.entryAdded":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str(parameters["args"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 60)[0], "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
