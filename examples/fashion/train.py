"""Train the Fashion-MNIST models and write the ONNX files and data that ship with the repository.

    apt-get install dataset-fashion-mnist
    python examples/fashion/train.py vit cnn        # half an hour on two cores

The images stay in 0..1; the first layer learns its own normalisation.
"""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path

import models
import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SOURCE = Path("/usr/share/datasets/fashion-mnist")
EPOCHS = {"vit": 14, "cnn": 12}
PEAK_RATE = {"vit": 1.5e-3, "cnn": 4e-3}
BATCH = 128
CALIBRATION_IMAGES = 256


def read_split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images ``[N, 1, 28, 28]`` and int64 labels ``[N]`` of the split ``train`` or ``t10k``."""
    with gzip.open(SOURCE / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(SOURCE / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def augment(images: Tensor) -> Tensor:
    """Flip half of the images and shift each batch by up to two pixels."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    rows, columns = (int(torch.randint(-2, 3, ())) for _ in range(2))
    padded = nn.functional.pad(flipped, (2, 2, 2, 2))
    return padded[..., 2 + rows : 30 + rows, 2 + columns : 30 + columns]


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right answers in percent."""
    model.eval()
    logits = [model(torch.from_numpy(part) / 255.0) for part in np.array_split(images, 20)]
    return float((torch.cat(logits).argmax(1).numpy() == labels).mean() * 100)


def train(name: str) -> nn.Module:
    """Train one model from scratch with AdamW and a one-cycle rate, in bfloat16 where the CPU has it."""
    torch.manual_seed(0)
    images, labels = read_split("train")
    pixels, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    model = getattr(models, name)()
    steps = EPOCHS[name] * (len(pixels) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE[name], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE[name], total_steps=steps)
    for epoch in range(EPOCHS[name]):
        model.train()
        start, order = time.perf_counter(), torch.randperm(len(pixels))
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(pixels[chosen] / 255.0))
            loss = nn.functional.cross_entropy(logits.float(), targets[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        score = accuracy(model, *read_split("t10k"))
        print(f"{name} epoch {epoch + 1}: {score:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    return model


def export(name: str, model: nn.Module) -> None:
    """Write ``NAME.onnx`` with a dynamic batch, BatchNormalization nodes left in place."""
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: batch}},
        dynamo=True,
        optimize=False,
        verbose=False,
        opset_version=20,
    )
    program.save(HERE / f"{name}.onnx", external_data=False)


def write_data() -> None:
    """Write the calibration images (from the training split) and the labelled test split."""
    images, labels = read_split("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION_IMAGES, replace=False)
    calibration = images[chosen].astype(np.float32) / 255
    for name in EPOCHS:
        np.savez_compressed(HERE / f"{name}.calib.npz", image=calibration)
    images, labels = read_split("t10k")
    np.savez_compressed(HERE / "eval.npz", image=images.astype(np.float32) / 255, labels=labels)


if __name__ == "__main__":
    write_data()
    for name in sys.argv[1:] or EPOCHS:
        trained = train(name)
        torch.save(trained.state_dict(), HERE / f"{name}.pt")
        export(name, trained)
