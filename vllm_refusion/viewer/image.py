"""Pictures of a trace, with Pillow: one moment as PNG, all of them as GIF."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vllm_refusion.files import writing
from vllm_refusion.viewer.timeline import Timeline

WIDTH, MARGIN, LINE, SIZE, SCALE = 760, 16, 26, 15, 2  # in pixels of the picture; drawn larger
HOLD = 2500  # milliseconds that the last picture stays
SHORTEST = 20  # milliseconds; players slow down what is shorter
TEXT_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")


@dataclass(frozen=True)
class Style:
    """How pictures look.

    Attributes:
        font: a TrueType file that has the text's script; else a common Latin one that is found.
    """

    dark: bool = False
    font: Path | None = None

    @property
    def paper(self) -> str:
        return "#16181c" if self.dark else "#ffffff"

    @property
    def ink(self) -> str:
        return "#e6e8eb" if self.dark else "#1c1e21"

    @property
    def soft(self) -> str:
        return "#a2a9b2" if self.dark else "#5b6168"

    @property
    def mask(self) -> str:
        return "#33383f" if self.dark else "#dfe3e8"

    def of_round(self, number: int | None) -> tuple[int, int, int]:
        """The page's colour of a round."""
        lightness, saturation = (0.25, 0.45) if self.dark else (0.82, 0.78)
        hue = (number or 0) * 137.5 % 360 / 360
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
        return round(255 * red), round(255 * green), round(255 * blue)

    def load(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        if self.font is not None:
            return ImageFont.truetype(str(self.font), size)
        for name in TEXT_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
        return ImageFont.load_default(size)


def write_png(path: Path, timeline: Timeline, number: int, style: Style) -> None:
    """The state after pass ``number``."""
    with writing(path, "wb") as file:
        _Drawer(timeline, style).picture(number).save(file, "PNG", optimize=True)


def write_gif(path: Path, timeline: Timeline, speed: float, style: Style) -> None:
    """All passes; 1 is the recorded speed."""
    drawer = _Drawer(timeline, style)
    frames = [drawer.picture(number) for number in range(len(timeline.passes) + 1)]
    ends = [0.0, *(entry.end for entry in timeline.passes)]
    lengths = [max(SHORTEST, round(1000 * (b - a) / speed)) for a, b in zip(ends, ends[1:])]
    # one palette for all, from the most colourful picture: rounds keep their colours
    palette = frames[-1].quantize(128)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with writing(path, "wb") as file:
        small[0].save(
            file,
            "GIF",
            save_all=True,
            append_images=small[1:],
            duration=[*lengths, HOLD],
            loop=0,
            optimize=True,
        )


class _Drawer:
    """Draws the moments of one timeline, every token at the place of its final text."""

    def __init__(self, timeline: Timeline, style: Style) -> None:
        self._timeline, self._style = timeline, style
        self._font = style.load(SIZE * SCALE)
        self._small = style.load(12 * SCALE)
        self._boxes, lines = self._place()
        self._text_end = MARGIN + lines * LINE
        self._height = self._text_end + 100

    def _place(self) -> tuple[list[tuple[int, int, int] | None], int]:
        """(x, y, width) of every position that is ever committed, and the number of lines."""
        x, line = MARGIN * SCALE, 0
        boxes: list[tuple[int, int, int] | None] = []
        for position in self._timeline.positions:
            settled = next((e for e in position.events if e.state == "committed"), None)
            if settled is None:
                boxes.append(None)
                continue
            width = round(self._font.getlength(settled.text.replace("\n", ""))) or 4 * SCALE
            if x + width > (WIDTH - MARGIN) * SCALE:
                x, line = MARGIN * SCALE, line + 1
            boxes.append((x, (MARGIN + line * LINE) * SCALE, width))
            x += width
            if "\n" in settled.text:
                x, line = MARGIN * SCALE, line + settled.text.count("\n")
        return boxes, line + 1

    def picture(self, number: int) -> Image.Image:
        style, timeline = self._style, self._timeline
        image = Image.new("RGB", (WIDTH * SCALE, self._height * SCALE), style.paper)
        draw = ImageDraw.Draw(image)
        size = timeline.parameters["slot_size"]
        for index, (position, box) in enumerate(zip(timeline.positions, self._boxes)):
            if box is None:
                continue
            x, y, width = box
            event = position.at(number)
            state = event.state if event else "masked"
            if state in ("dropped", "cut"):
                continue
            ground = style.of_round(position.round) if state == "committed" else style.mask
            draw.rectangle((x, y, x + width - 1, y + (LINE - 5) * SCALE), fill=ground)
            if event and state != "masked":
                colour = style.soft if state == "draft" else style.ink
                text = event.text.replace("\n", "")
                where = (x, y + (LINE - 5) * SCALE // 2)
                draw.text(where, text, fill=colour, font=self._font, anchor="lm")
            if index % size == 0:
                draw.line((x, y, x, y + (LINE - 5) * SCALE), fill=style.soft, width=SCALE)
        self._bars(draw, number)
        return image.resize((WIDTH, self._height), Image.Resampling.LANCZOS)

    def _bars(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        """What the pass did, and the tokens that each pass committed."""
        passes, style = self._timeline.passes, self._style
        top, tall = self._text_end + 40, 44
        entry = passes[number - 1] if number else None
        label = f"pass {number} of {len(passes)}"
        if entry:
            label += f": {' + '.join(entry.kinds)}, {entry.rows} rows, {entry.end:.2f} s"
        draw.text((MARGIN * SCALE, (top - 26) * SCALE), label, fill=style.soft, font=self._small)
        step = (WIDTH - 2 * MARGIN) / len(passes)
        most = max(len(one.committed) for one in passes) or 1
        for index, one in enumerate(passes[:number]):
            x = MARGIN + index * step
            count = len(one.committed)
            colour: str | tuple[int, int, int] = style.mask
            if count:
                colour = style.of_round(self._timeline.positions[one.committed[0]].round)
            height = max(2, tall * count / most)
            box = (x + 1, top + tall - height, x + max(2, step - 1), top + tall)
            draw.rectangle([round(edge * SCALE) for edge in box], fill=colour)
