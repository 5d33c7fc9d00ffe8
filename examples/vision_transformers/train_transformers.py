"""Train the two transformers on Fashion-MNIST and write the ONNX files that ship with the repository.

    apt-get install dataset-fashion-mnist
    python examples/fashion/train.py cnn                                # the teacher
    python examples/vision_transformers/train_transformers.py deit swin # about ten minutes each on one core

As DeiT does, both learn from a convolutional teacher: half of the loss is the divergence from its distribution, which is computed
once for every image and its mirror image.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import networks
import onnx
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
FASHION = HERE.parent / "fashion"
sys.path.insert(0, str(FASHION))
from train import accuracy, export, load_teacher, objective, read_split  # noqa: E402

EPOCHS = {"deit": 6, "swin": 6}
RATE, BATCH = 3e-3, 128


@torch.no_grad()
def teach(pixels: Tensor) -> Tensor:
    """Return the teacher's logits ``[2, N, 10]`` for the images and their mirror images."""
    teacher = load_teacher("cnn")
    assert teacher is not None
    with torch.autocast("cpu", torch.bfloat16):
        halves = [[teacher(part.float() / 255.0).float() for part in images.split(500)] for images in (pixels, pixels.flip(-1))]
    return torch.stack([torch.cat(half) for half in halves])


def train(name: str) -> nn.Module:
    """Train one model from scratch in one cycle of AdamW, in bfloat16 where the CPU has it."""
    torch.manual_seed(0)
    images, labels = read_split("train")
    pixels, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels)
    began, wanted, model = time.perf_counter(), teach(pixels), getattr(networks, name)()
    steps = len(pixels) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=EPOCHS[name] * steps)
    for epoch in range(EPOCHS[name]):
        model.train()
        for chosen in torch.randperm(len(pixels))[: steps * BATCH].split(BATCH):
            mirrored = torch.randint(2, (BATCH,))
            batch = pixels[chosen] / 255.0
            batch = torch.where(mirrored[:, None, None, None] == 1, batch.flip(-1), batch)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch).float()
            loss = objective(logits, targets[chosen], wanted[mirrored, chosen])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        score = accuracy(model, *read_split("t10k"))
        print(f"{name} epoch {epoch + 1}: {score:.2f} %, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def strip_traces(path: Path) -> None:
    """Leave out where in the source each node comes from, which is a third of the file; its module stays."""
    model = onnx.load(path)
    for holder in (*model.graph.node, *model.graph.value_info):
        kept = [p for p in holder.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
    onnx.save(model, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or EPOCHS:
        model = train(name)
        torch.save(model.state_dict(), HERE / f"{name}.pt")
        export(name, model, HERE)
        strip_traces(HERE / f"{name}.onnx")
