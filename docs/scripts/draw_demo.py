"""Turns the demo's video into docs/images/demo.gif.

make demo && python docs/scripts/draw_demo.py [demo_out/scene.mp4]
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from PIL import Image

OUTPUT = Path(__file__).resolve().parents[1] / "images" / "demo.gif"
WIDTH = 560
FRAMES_PER_S = 8
COLOURS = 128


def main(video: str = "demo_out/scene.mp4") -> None:
    images = []
    next_s = 0.0
    with av.open(video) as container:
        for frame in container.decode(video=0):
            if frame.time >= next_s:
                next_s += 1 / FRAMES_PER_S
                image = frame.to_image()
                height = round(image.height * WIDTH / image.width)
                images.append(image.resize((WIDTH, height), Image.Resampling.LANCZOS))
    sample = images[:: max(1, len(images) // 6)]
    joined = Image.new("RGB", (WIDTH, sum(image.height for image in sample)))
    for index, image in enumerate(sample):
        joined.paste(image, (0, index * image.height))
    palette = joined.quantize(COLOURS)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    first.save(
        OUTPUT, save_all=True, append_images=others, duration=1000 // FRAMES_PER_S, loop=0,
        optimize=True,
    )  # fmt: skip
    print(f"{OUTPUT}: {len(images)} frames, {OUTPUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
