"""Train a small InternImage on Fashion-MNIST, in about three minutes on one core, and write the ONNX file that ships with the repository.

    apt-get install dataset-fashion-mnist
    python examples/internimage/train_fashion.py

The data, the augmentation and the score are those of examples/fashion.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import internimage
import torch
from torch import nn

from deploycc import registry
from deploycc.export import export

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "fashion"))

from train import accuracy, augment, read_split  # noqa: E402

EPOCHS, BATCH, RATE, SHIFT = 2, 128, 4e-3, 1
trained: nn.Module = internimage.fashion()


def train(model: nn.Module) -> None:
    """Run one cycle of AdamW over the training split."""
    images, labels = read_split("train")
    pixels, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    steps = len(pixels) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        start = time.perf_counter()
        model.train()
        for chosen in torch.randperm(len(pixels))[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(augment(pixels[chosen] / 255.0, SHIFT)), targets[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(model, *read_split('t10k')):.2f} %, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Train, and export with one DCNv3 node per layer and a dynamic batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    trained.load_state_dict(internimage.fashion().state_dict())
    train(trained)
    sys.modules["train_fashion"] = sys.modules[__name__]
    out = HERE / "fashion.onnx"
    export("train_fashion:model", out, shapes=("image=1x1x28x28:8x1x28x28:4096x1x28x28",), plugins=registry.plugins())
    print(f"wrote {out.name}, {out.stat().st_size / 1e6:.2f} MB")


def model() -> nn.Module:
    """Return the trained model, for the exporter."""
    return trained


if __name__ == "__main__":
    main()
