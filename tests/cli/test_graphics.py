"""Previews in a terminal, as terminals read them: what is written is decoded by Pillow, by a decoder of sixels that is
written here after DEC STD 070, and by pyte's screen."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyte
import pytest
from PIL import Image

from tiler.cli.graphics import Protocol, Screen, screen_of
from tiler.cli.progress import ProgressPrinter
from tiler.events import Event, PhaseStarted, Progress, Shown
from tiler.memory.budget import Budget

KITTY, SIXEL, NEITHER = b"\x1b_Gi=1;OK\x1b\\\x1b[?62;c", b"\x1b[?62;4;22c", b"\x1b[?1;2c"
CONTROLS = re.compile(r"\x1b[_P].*?\x1b\\", re.DOTALL)  # commands of kitty's, and sixels


@contextmanager
def terminal(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """A pseudo terminal of 80 × 24 cells as standard error, which answers a question for its attributes. Yields what
    was written to it."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    seen = bytearray()

    def play() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:
                return
            seen.extend(data)
            if data.endswith(b"\x1b[c"):
                os.write(ours, answer)

    thread = threading.Thread(target=play)
    thread.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield seen
        stream.flush()
        termios.tcdrain(stream.fileno())
    thread.join()
    os.close(ours)


def picture(height: int = 160, width: int = 200) -> np.ndarray:
    """Smooth, and another one in each channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, 255 * (x + y) // (width + height)], axis=2).astype(np.uint8)


def kitty_pictures(text: str) -> list[tuple[dict[str, str], np.ndarray]]:
    """Each picture's keys and pixels."""
    found: list[tuple[dict[str, str], str]] = []
    for said, data in re.findall(r"\x1b_G([^;]*);(.*?)\x1b\\", text):
        keys = dict(part.split("=") for part in said.split(","))
        if keys.get("a") == "T":
            found.append((keys, data))
        elif "m" in keys:
            found[-1] = found[-1][0], found[-1][1] + data
    return [(keys, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for keys, data in found]


def sixel_pixels(text: str) -> np.ndarray:
    """The pixels of one sixel picture; those that nothing paints are 0."""
    body = re.search(r'\x1bP[\d;]*q"1;1;(\d+);(\d+)(.*?)\x1b\\', text, re.DOTALL)
    assert body is not None
    pixels = np.zeros((int(body[2]), int(body[1]), 3), np.uint8)
    palette: dict[int, list[int]] = {}
    x = y = colour = 0
    for token in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|([$-])|([?-~])", body[3]):
        number, *rgb, count, repeated, move, one = token.groups()
        if rgb[0] is not None:
            palette[int(number)] = [round(255 * int(v) / 100) for v in rgb]
        elif number is not None:
            colour = int(number)
        elif move is not None:
            x, y = 0, y + 6 * (move == "-")
        else:
            bits, times = ord(repeated or one) - 63, int(count or 1)
            for row in range(6):
                if bits >> row & 1:
                    pixels[y + row, x : x + times] = palette[colour]
            x += times
    return pixels


def blurred(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((20, 16), Image.Resampling.BOX)).astype(int)


def test_kitty_gets_a_png_over_cells_of_the_right_shape() -> None:
    drawn = Screen(80, 24, (10, 20), Protocol.KITTY).draw(picture(320, 400))
    ((keys, pixels),) = kitty_pictures(drawn.text)
    assert pixels.shape == (240, 300, 3)  # 12 of 24 rows
    assert (int(keys["c"]), int(keys["r"])) == (30, drawn.lines) == (30, 12)
    assert keys["C"] == "1" and keys["q"] == "2"  # the cursor stays, and no answer is typed into the shell
    assert abs(blurred(pixels) - blurred(picture(320, 400))).max() <= 2
    assert max(map(len, re.findall(r";([^;]*)\x1b\\", drawn.text))) <= 4096


def test_sixels_are_the_picture_but_for_their_palette() -> None:
    drawn = Screen(80, 60, (10, 20), Protocol.SIXEL).draw(picture())
    pixels = sixel_pixels(drawn.text)
    assert pixels.shape == picture().shape and drawn.lines == 8
    assert abs(pixels.astype(int) - picture()).max() <= 255 / 5 + 1
    assert abs(blurred(pixels) - blurred(picture())).max() <= 8  # dithered


def test_half_blocks_are_two_pixels_a_cell() -> None:
    drawn = Screen(80, 24, (10, 20), Protocol.BLOCKS).draw(picture())
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(drawn.plain())
    cells = [screen.buffer[row][column] for row in range(drawn.lines) for column in range(30)]
    colours = [[int(name[n : n + 2], 16) for n in (0, 2, 4)] for cell in cells for name in (cell.fg, cell.bg)]
    shown = np.array(colours, np.uint8).reshape(drawn.lines, 30, 2, 3).swapaxes(1, 2).reshape(24, 30, 3)
    want = np.asarray(Image.fromarray(picture()).resize((30, 24), Image.Resampling.BOX))
    assert {cell.data for cell in cells} == {"▀"}
    assert abs(shown.astype(int) - want).max() <= 2


@pytest.mark.parametrize(
    ("answer", "protocol"), [(KITTY, Protocol.KITTY), (SIXEL, Protocol.SIXEL), (NEITHER, Protocol.BLOCKS)]
)
def test_the_progress_bar_stays_whole_below_pictures(
    answer: bytes, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(answer, monkeypatch) as seen:
        events: list[Event] = [PhaseStarted(name="canvas", total=4)]
        for done in (1, 2, 4):
            progress = Progress(name="canvas", done=done, total=4, detail=f"step {done}/4, 1/1 tile passes")
            events += [progress, Shown(pixels=picture())]
        with ProgressPrinter(Budget("1GB"), quiet=False) as printer:
            for event in events:
                printer(event)
            assert printer._screen is not None and printer._screen.protocol is protocol
    text = bytes(seen).decode()
    shown = len(kitty_pictures(text)) if protocol is Protocol.KITTY else text.count("\x1bP0;1q")
    assert shown == (0 if protocol is Protocol.BLOCKS else 3)
    screen = pyte.HistoryScreen(80, 24)
    pyte.Stream(screen).feed(CONTROLS.sub("", text))
    past = ["".join(line[column].data for column in range(80)) for line in screen.history.top]
    lines = [*past, *screen.display]
    bars = [number for number, line in enumerate(lines) if "canvas" in line]
    assert len(bars) == 1, lines  # only the last state is left, below all pictures
    assert "step 4/4, tile 1/1" in lines[bars[0]]
    above = lines[: bars[0]]
    assert all(set(line) <= set(" ▀") for line in above) and len(above) == 3 * (
        12 if protocol is Protocol.BLOCKS else 8
    )
    assert re.match(r"peak [\d,]+ MB", lines[bars[0] + 1])
    assert not any(line.strip() for line in lines[bars[0] + 2 :])


def test_a_silent_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.cli.graphics._WAIT", 0.05)
    with terminal(b"", monkeypatch):
        before = termios.tcgetattr(sys.stderr.fileno())
        assert screen_of(sys.stderr.fileno()) == Screen(80, 24, (10, 20), Protocol.BLOCKS)
        assert termios.tcgetattr(sys.stderr.fileno()) == before


def test_a_render_shows_its_preview_in_the_terminal(
    in_process, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = "render", "a boat", "--model", tiny, "--size", 64, "--steps", 1, "--no-guide", "--max-ram", "2GB"
    refused = in_process(*common, "--preview", "-")
    assert refused.code == 2 and "--preview - needs a terminal on standard error" in refused.err
    with terminal(KITTY, monkeypatch) as seen:
        assert in_process(*common, "--preview", "-", "-o", "a.png").code == 0
    ((_, pixels),) = kitty_pictures(bytes(seen).decode())
    assert pixels.shape == (240, 240, 3)  # of 64 × 8 pixels for each latent, at most 12 rows of cells
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}
