"""`tiler view` shows the picture's pixels in a real browser, and serves only the loopback interface."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.viewing.chromium import PROGRAM, Chromium
from tiler.errors import Interrupted
from tiler.viewing.pyramid import OVERLAP, SIDE, Pyramid
from tiler.viewing.server import PageServer

pytest.importorskip("pyvips", reason="needs the extra `view`")

HEIGHT, WIDTH = 1500, 2300
SEEN = 800, 600  # width and height of the browser's page


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8: all places differ, and neighbours differ little."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    waves = [np.sin(x / 23) + np.cos(y / 31), np.sin((x + y) / 19) + y / HEIGHT, np.cos(x / 47) * 2 * x / WIDTH]
    return np.stack([127 + 60 * wave for wave in waves], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def picture(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "poster.png"
    Image.fromarray(pixels).save(path, compress_level=1)
    return path


def wait_for(pyramid: Pyramid) -> None:
    until = time.monotonic() + 60
    while not (pyramid.is_whole or pyramid.fault) and time.monotonic() < until:
        time.sleep(0.02)
    assert not pyramid.fault, pyramid.fault


@contextmanager
def program(*args: object, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tiler view` in a process of its own, and the page's address."""
    command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "view", "--no-browser", *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match is not None, (line, process.communicate()[1])
        yield process, match[0]
    finally:
        process.kill()
        process.communicate()


def test_tiles_are_the_picture(picture: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    with Pyramid(picture, tmp_path) as pyramid:
        wait_for(pyramid)
        assert (pyramid.width, pyramid.height, pyramid.levels) == (WIDTH, HEIGHT, 12)
        data = pyramid.tile(pyramid.levels, 3, 2)
        assert data is not None
        tile = np.asarray(Image.open(BytesIO(data)), dtype=float)
        top, left = (SIDE * number - OVERLAP for number in (2, 3))
        own = pixels[top : top + tile.shape[0], left : left + tile.shape[1]]
        assert tile.shape[:2] == (SIDE + 2 * OVERLAP,) * 2
        assert abs(tile - own).mean() < 1.5 and abs(tile - own).max() < 24
        small = pyramid.tile(pyramid.levels - 4, 0, 0)  # 144×94 pixels: all of it
        assert small is not None
        whole = np.asarray(Image.open(BytesIO(small)), dtype=float)
        means = pixels[:1488, :2288].reshape(93, 16, 143, 16, 3).mean((1, 3))
        assert abs(whole[:93, :143] - means).mean() < 3
        assert pyramid.tile(pyramid.levels, 99, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_the_overview_of_a_jpeg_comes_from_its_eighth(tmp_path: Path) -> None:
    """Its tiles lie where those of the whole picture would."""
    x = np.arange(20000, dtype=np.float32)
    row = np.stack([127 + 100 * np.sin(x / n) for n in (500, 900, 1700)], axis=-1)
    picture = np.broadcast_to(row.clip(0, 255).astype(np.uint8), (40, *row.shape))
    Image.fromarray(picture).save(tmp_path / "wide.jpg", quality=95)
    with Pyramid(tmp_path / "wide.jpg", tmp_path) as pyramid:
        wait_for(pyramid)
        assert pyramid.levels == 15
        data = pyramid.tile(11, 4, 0)  # of 1,250 × 3 pixels, the last
        assert data is not None
        tile = np.asarray(Image.open(BytesIO(data)), dtype=float)
    means = row.reshape(1250, 16, 3).mean(axis=1)[4 * SIDE - OVERLAP :]
    assert tile.shape == (3, *means.shape)
    assert abs(tile[1] - means).mean() < 2


def test_a_rotated_jpeg_is_upright_and_read_once(tmp_path: Path) -> None:
    """libvips stores its rows in another order anyway, so an overview would only take time."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: displayed after a quarter turn to the right
    pixels = np.zeros((16, 4200, 3), np.uint8)
    pixels[:, 2100:] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    with Pyramid(tmp_path / "turned.jpg", tmp_path) as pyramid:
        wait_for(pyramid)
        assert (pyramid.width, pyramid.height) == (16, 4200)
        assert [path.name for path in tmp_path.glob("tiler-view-*/*_files")] == ["picture_files"]
        data = pyramid.tile(8, 0, 0)
    assert data is not None
    small = np.asarray(Image.open(BytesIO(data)))
    assert small.shape[:2] == (132, 1) and small[:60].max() < 20 and small[-60:].min() > 235


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    pyvips = pytest.importorskip("pyvips")
    for name, kind in (("uchar", "srgb"), ("ushort", "rgb16")):
        clear = pyvips.Image.black(32, 32, bands=4).cast(name).copy(interpretation=kind)
        clear.write_to_file(str(tmp_path / f"{name}.png"))
        with Pyramid(tmp_path / f"{name}.png", tmp_path) as pyramid:
            wait_for(pyramid)
            data = pyramid.tile(pyramid.levels, 0, 0)
        assert data is not None
        assert np.asarray(Image.open(BytesIO(data))).min() >= 254


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("{0}", None, 200),
        ("{0}facts.json", None, 200),
        ("{0}tiles/12/0_0.jpg", None, 200),
        ("{0}tiles/12/99_0.jpg", None, 404),
        ("/", None, 404),
        ("/wrong/", None, 404),
        ("{0}../server.py", None, 404),
        ("{0}tiles/12/../../picture.dzi", None, 404),
        ("{0}%2e%2e/server.py", None, 404),
        ("{0}openseadragon.LICENSE.txt", None, 404),
        ("{0}/etc/passwd", None, 404),
        ("{0}tiles/12/0_0.jpg\\..\\x", None, 404),
        ("{0}", "tiler.example.org", 403),
        ("{0}", "127.0.0.1", 403),
    ],
)
def test_nothing_else_is_served(served: PageServer, path: str, host: str | None, status: int) -> None:
    secret = served.url.partition(f":{served.port}")[2]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.putrequest("GET", path.format(secret), skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{served.port}")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status == status
    assert (len(body) > 0) == (status == 200)


@pytest.fixture(scope="module")
def served(picture: Path) -> Iterator[PageServer]:
    with Pyramid(picture) as pyramid, PageServer(pyramid) as server:
        wait_for(pyramid)
        yield server


def test_the_browser_is_started_without_the_secret(
    in_process, picture: Path, served: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command line holds an address that leads to the page once."""
    opened: list[str] = []

    def browse(url: str) -> bool:
        opened.append(url)
        raise Interrupted(signal.SIGINT)  # as Ctrl-C does

    monkeypatch.setattr("webbrowser.open", browse)
    ran = in_process("view", picture)
    assert ran.code == 0 and len(opened) == 1, ran.err
    shown = re.search(r"http://\S+:\d+/([\w-]+)/", ran.out)
    assert shown is not None and shown[1] not in opened[0]

    def follow(url: str) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("GET", url.partition(f":{served.port}")[2])
        answer = connection.getresponse()
        connection.close()
        return answer.status, answer.getheader("Location")

    ticket = served.ticket()
    assert follow(ticket) == (303, served.url.partition(f":{served.port}")[2])
    assert follow(ticket) == (404, None)
    monkeypatch.setattr("tiler.viewing.server._TICKET", 0)
    assert follow(served.ticket()) == (404, None)


def test_transparent_parts_are_white_in_16_bits_too(tmp_path: Path) -> None:
    import pyvips

    clear = pyvips.Image.black(64, 64, bands=4).cast("ushort").copy(interpretation="rgb16")
    clear.pngsave(str(tmp_path / "clear.png"))
    with Pyramid(tmp_path / "clear.png", tmp_path) as pyramid:
        wait_for(pyramid)
        data = pyramid.tile(pyramid.levels, 0, 0)
    assert data is not None and np.asarray(Image.open(BytesIO(data))).min() > 250


def test_only_loopback_listens_and_ctrl_c_ends_it(picture: Path, tmp_path: Path) -> None:
    with program(picture, "--scratch", tmp_path) as (process, url):
        listening = [c for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
        assert f":{listening[0].laddr.port}/" in url
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "no such picture"),
        ("text.png", "cannot be read as a picture"),
        ("short.png", "the picture may be damaged"),
        ("x.png --scratch nowhere", "nowhere: cannot be written"),
    ],
)
def test_what_cannot_be_shown_is_one_line(in_process, picture: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "short.png").write_bytes(picture.read_bytes()[:90_000])
    ran = in_process("view", "--no-browser", *name.split())
    assert ran.code in (2, 6), ran
    assert message in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_a_missing_extra_is_named(in_process, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    ran = in_process("view", picture)
    assert ran.code == 2 and "pip install pyvips" in ran.err


# In the page: where the picture is looked at, in its pixels, once nothing moves and all tiles are there.
SETTLED = """new Promise(async (done) => {
  const bounds = () => viewer.viewport.viewportToImageRectangle(viewer.viewport.getBounds(true));
  let before = "";
  for (;;) {
    await new Promise((next) => setTimeout(next, 150));
    if (!window.viewer || !viewer.world.getItemCount()) continue;
    const now = bounds(), key = JSON.stringify(now);
    if (key === before && viewer.world.getItemAt(0).getFullyLoaded()) return done([now.x, now.y, now.width, now.height]);
    before = key;
  }
})"""


@pytest.mark.skipif(PROGRAM is None, reason="needs chromium")
def test_panned_and_zoomed_in_a_browser_it_is_the_picture(
    served: PageServer, pixels: np.ndarray, tmp_path: Path
) -> None:
    image = Image.fromarray(pixels)

    def check(page: Chromium) -> list[float]:
        """Compare the visible part of the page with the picture's pixels."""
        x, y, width, height = at = page.evaluate(SETTLED)
        seen = page.screenshot()
        rows, cols = np.mgrid[: SEEN[1], : SEEN[0]]
        # Where the picture is, away from its border, the little map and the line of text.
        across, down = x + (cols + 0.5) * width / SEEN[0], y + (rows + 0.5) * height / SEEN[1]
        inside = (across > 20) & (across < WIDTH - 20) & (down > 20) & (down < HEIGHT - 20)
        inside &= ~((cols > 0.75 * SEEN[0]) & (rows < 0.3 * SEEN[1])) & (rows < SEEN[1] - 30)
        data = (width / SEEN[0], 0, x, 0, height / SEEN[1], y)  # from the page to the picture
        wanted = image.transform(SEEN, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
        apart = abs(seen.astype(int) - np.asarray(wanted).astype(int))[inside]
        assert inside.mean() > 0.3
        assert apart.mean() < 4 and np.percentile(apart, 99) < 20, (at, apart.mean(), np.percentile(apart, 99))
        return at

    with Chromium(tmp_path / "profile", SEEN) as page:
        page.call("Page.navigate", url=served.url)
        first = check(page)
        assert first[0] <= 0 and first[0] + first[2] >= WIDTH  # all of it
        for _ in range(6):
            page.mouse("mouseWheel", 300, 350, deltaX=0, deltaY=-120)
            time.sleep(0.1)  # it takes one turn of the wheel within 50 ms
        second = check(page)
        assert second[2] < first[2] / 2
        fixed = [at[i] + share * at[2 + i] for at in (first, second) for i, share in ((0, 300 / 800), (1, 350 / 600))]
        assert np.allclose(fixed[:2], fixed[2:], atol=8)  # what is under the pointer stays there
        page.mouse("mousePressed", 300, 300, button="left", buttons=1, clickCount=1)
        for step in range(1, 11):
            page.mouse("mouseMoved", 300 + 20 * step, 300 + 10 * step, button="left", buttons=1)
        page.mouse("mouseReleased", 500, 400, button="left", buttons=0, clickCount=1)
        third = check(page)
        scale = second[2] / SEEN[0]
        assert np.allclose([second[0] - third[0], second[1] - third[1]], [200 * scale, 100 * scale], atol=6 * scale + 2)
