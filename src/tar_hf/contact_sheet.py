"""A contact sheet: many pictures on one, each over its caption."""

import math
import textwrap

SIDE = 256  # pixels of a picture on the sheet
MARGIN = 12
LINES = 3  # of a caption at most
FONT_SIZE, LINE_HEIGHT = 14, 18


def make_tile(image, caption: str):
    """One picture with its caption, to be put on a sheet."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    tile = Image.new("RGB", (SIDE, SIDE + LINES * LINE_HEIGHT + MARGIN // 2), "white")
    picture = ImageOps.contain(image, (SIDE, SIDE))
    tile.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    font, draw = ImageFont.load_default(FONT_SIZE), ImageDraw.Draw(tile)
    letters = int(0.95 * SIDE * len(caption) / font.getlength(caption))  # of a line, by the caption's average letter
    for i, line in enumerate(textwrap.wrap(caption, letters, max_lines=LINES, placeholder="...")):
        draw.text((0, SIDE + MARGIN // 2 + i * LINE_HEIGHT), line, "black", font)
    return tile


def make_sheet(tiles: list, columns: int | None = None):
    """Tiles in reading order, in so many columns; by default about as many as rows."""
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    width, height = (side + MARGIN for side in tiles[0].size)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (MARGIN + i % columns * width, MARGIN + i // columns * height))
    return sheet
