"""Train the Fashion-MNIST models and write the ONNX files and data that ship with the repository.

    apt-get install dataset-fashion-mnist
    python examples/fashion/train.py vit cnn        # half an hour or more on two cores

The images stay in 0..1; the first layer learns its own normalisation.
"""

from __future__ import annotations

import gzip
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SOURCE = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Cycle:
    """One one-cycle schedule: epochs, peak rate, largest shift in pixels, a trained model to learn from."""

    epochs: int
    rate: float
    shift: int
    teacher: str | None = None
    batch: int = 128


CYCLES = {
    "cnn": (Cycle(12, 4e-3, shift=2),),
    "vit": (Cycle(12, 2e-3, shift=1, teacher="cnn", batch=256),),
}


def read_split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images ``[N, 1, 28, 28]`` and int64 labels ``[N]`` of the split ``train`` or ``t10k``."""
    with gzip.open(SOURCE / f"{name}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(SOURCE / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def augment(images: Tensor, shift: int) -> Tensor:
    """Flip half of the images and shift the batch by up to ``shift`` pixels."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    rows, columns = (int(torch.randint(-shift, shift + 1, ())) for _ in range(2))
    padded = nn.functional.pad(flipped, (shift,) * 4)
    return padded[..., shift + rows : shift + 28 + rows, shift + columns : shift + 28 + columns]


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right answers in percent."""
    model.eval()
    logits = [model(torch.from_numpy(part.copy()) / 255.0) for part in np.array_split(images, 20)]
    return float((torch.cat(logits).argmax(1).numpy() == labels).mean() * 100)


def train(name: str) -> nn.Module:
    """Train one model from scratch and keep its weights beside this file."""
    torch.manual_seed(0)
    model = getattr(models, name)()
    for cycle in CYCLES[name]:
        run(name, model, cycle)
    torch.save(model.state_dict(), HERE / f"{name}.pt")
    return model


def run(name: str, model: nn.Module, cycle: Cycle) -> None:
    """Run one cycle with AdamW, in bfloat16 where the CPU has it."""
    images, labels = read_split("train")
    pixels, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    teacher = load_teacher(cycle.teacher)
    optimiser = torch.optim.AdamW(model.parameters(), lr=cycle.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cycle.rate, total_steps=cycle.epochs * (len(pixels) // cycle.batch))
    for epoch in range(cycle.epochs):
        model.train()
        start, order = time.perf_counter(), torch.randperm(len(pixels))
        for chosen in order[: len(order) // cycle.batch * cycle.batch].split(cycle.batch):
            batch = augment(pixels[chosen] / 255.0, cycle.shift)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch).float()
                wanted = teacher(batch).float() if teacher else None
            loss = objective(logits, targets[chosen], wanted)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        score = accuracy(model, *read_split("t10k"))
        print(f"{name} epoch {epoch + 1}: {score:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)


def objective(logits: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
    """Return smoothed cross-entropy, or half of it and half the divergence from the teacher's distribution."""
    plain = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    if wanted is None:
        return plain
    divergence = nn.functional.kl_div(logits.log_softmax(1), wanted.detach().softmax(1), reduction="batchmean")
    return 0.5 * plain + divergence


def load_teacher(name: str | None) -> nn.Module | None:
    """Return a trained model in evaluation mode."""
    if name is None:
        return None
    teacher = getattr(models, name)().eval().requires_grad_(False)
    teacher.load_state_dict(torch.load(HERE / f"{name}.pt", weights_only=True))
    return teacher


def export(name: str, model: nn.Module, folder: Path = HERE) -> None:
    """Write ``NAME.onnx`` into ``folder`` with a dynamic batch, BatchNormalization nodes left in place."""
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
    program.save(folder / f"{name}.onnx", external_data=False)


def write_data() -> None:
    """Write the calibration images (from the training split) and the labelled test split."""
    images, labels = read_split("train")
    chosen = np.random.default_rng(0).choice(len(images), CALIBRATION_IMAGES, replace=False)
    calibration = images[chosen].astype(np.float32) / 255
    for name in CYCLES:
        np.savez_compressed(HERE / f"{name}.calib.npz", image=calibration)
    images, labels = read_split("t10k")
    np.savez_compressed(HERE / "eval.npz", image=images.astype(np.float32) / 255, labels=labels)


if __name__ == "__main__":
    write_data()
    for name in sys.argv[1:] or CYCLES:
        export(name, train(name))
