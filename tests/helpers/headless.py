"""A page in a headless browser, over the DevTools protocol: what it asked for, what its console says, what it shows."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # its sandbox does not work for root, as in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-port=0",
)
SECONDS = 200


def browser():
    """The path of an installed browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """What a page did."""

    requests: list = field(default_factory=list)
    """URLs, the page's own included."""
    console: list = field(default_factory=list)
    """Entries of its console and log, and exceptions, as text."""
    values: list = field(default_factory=list)
    """Of the expressions."""
    screenshot: bytes = b""


def open_page(path, *expressions, dark=False, width=1100):
    """Open a file, evaluate JavaScript expressions in it, take a picture of all of it."""
    return asyncio.run(asyncio.wait_for(_open(path, expressions, dark, width), SECONDS))


async def _open(path, expressions, dark, width):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            address = await _address(process, Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=2**28) as socket:
                return await _visit(socket, path, expressions, dark, width)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the browser's helpers too
            process.wait()


async def _address(process, file):
    """Where it listens, from the file that it writes when it does."""
    while not (file.exists() and len(lines := file.read_text().split()) == 2):
        assert process.poll() is None, f"{browser()} ended with {process.returncode} before it listened"
        await asyncio.sleep(0.05)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


async def _visit(socket, path, expressions, dark, width):
    page, numbers, loaded = Page(), itertools.count(1), False
    target = None

    async def call(method, **parameters):
        nonlocal loaded
        number = next(numbers)
        message = {"id": number, "method": method, "params": parameters}
        if target is not None:
            message["sessionId"] = target
        await socket.send_str(json.dumps(message))
        while True:
            answer = json.loads((await socket.receive()).data)
            loaded |= _note(answer, page)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    made = await call("Target.createTarget", url="about:blank")
    attached = await call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
    target = attached["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        await call(f"{domain}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await call("Emulation.setEmulatedMedia", features=[scheme])
    await call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    await call("Page.navigate", url=Path(path).resolve().as_uri())
    while not loaded:
        loaded |= _note(json.loads((await socket.receive()).data), page)
    for expression in expressions:
        answer = await call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        page.values.append(answer["result"].get("value"))
    shot = await call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    page.screenshot = base64.b64decode(shot["data"])
    return page


def _note(answer, page):
    """Write down an event; whether the page has loaded."""
    method, parameters = answer.get("method"), answer.get("params", {})
    if method == "Network.requestWillBeSent":
        page.requests.append(parameters["request"]["url"])
    elif method == "Log.entryAdded":
        page.console.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
    elif method == "Runtime.consoleAPICalled":
        page.console.append(f"{parameters['type']}: {parameters['args']}")
    elif method == "Runtime.exceptionThrown":
        page.console.append(f"exception: {parameters['exceptionDetails']}")
    return method == "Page.loadEventFired"
