#!/usr/bin/env bash
# Pillow turns 16-bit PNG files into 8-bit RGB by two rules. Colours keep their upper eight bits. Grey values are cut:
# whatever lies above 255 is white, so a common 16-bit grey image becomes all white, without a word.
# Seen on Python 3.11, Pillow 13.0.0: 0, 100, 256, 4660, 65535 in colour become 0, 0, 1, 18, 255; in grey, read in mode
# I;16, they become 0, 100, 255, 255, 255 (also with convert("L")).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import struct
import zlib

from PIL import Image


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def red_of_rgb(path, color_type, channels):
    """Write one row of the values as a 16-bit PNG file, read it with Pillow, convert it."""
    row = b"\0" + b"".join(struct.pack(">H", value) * channels for value in values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, color_type, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header))
        file.write(chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        red = [rgb.getpixel((column, 0))[0] for column in range(len(values))]
        print(f"{path}, read in mode {image.mode}: {values} become {red}")
    return red


values = [0, 100, 256, 4660, 65535]
color = red_of_rgb("color16.png", 2, 3)
grey = red_of_rgb("grey16.png", 0, 1)
if color != [0, 0, 1, 18, 255] or grey != [0, 100, 255, 255, 255]:
    raise SystemExit("changed: 16-bit values are converted in another way")
PYTHON
