"""Fine-tunes a model on pictures with annotations in COCO's panoptic format.

    python examples/finetune.py MODEL --train scenes/train --val scenes/val --output run

On several devices, `accelerate launch` takes the place of `python`. The recipe is that of
github.com/tue-mps/eomt (training/, datasets/transforms.py, configs/dinov3/). The output folder gets
the model, its figures, a picture of the loss, and a checkpoint, which --resume continues.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from converter.pictures.datasets import Dataset, Segments, open_dataset
from converter.pictures.evaluation import evaluate
from reference_model import EomtDinov3ForUniversalSegmentation, EomtImageProcessor


class Crops(torch.utils.data.Dataset[dict[str, Any]]):
    """All crops of a training in their order, which the seed decides."""

    def __init__(
        self, pictures: Dataset, processor: EomtImageProcessor, args: argparse.Namespace, count: int
    ) -> None:
        self.pictures, self.processor, self.args, self.count = pictures, processor, args, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.pictures))
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.pictures))
        rng = np.random.default_rng((self.args.seed, epoch, place))
        for index in np.roll(order, -place).tolist():  # the next one in place of one without labels
            example: Any = self.pictures.read(index)
            if not all(example.target.crowd):
                return self.crop(example.image, example.target, rng)
        raise ValueError("no picture has a segment that is not a crowd")

    def crop(
        self, image: Image.Image, target: Segments, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Flips, scales and crops a picture at random, until a segment is in the crop."""
        ids = Image.fromarray((target.ids + 1).astype(np.int32))  # 0 for no segment
        height, width = self.processor.image_size
        if rng.random() < 0.5:
            image, ids = ImageOps.mirror(image), ImageOps.mirror(ids)
        found: list[int] = []
        while not found:
            scale = min(height / image.height, width / image.width) * rng.uniform(*self.args.scale)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            left = int(rng.integers(max(0, size[0] - width) + 1))
            top = int(rng.integers(max(0, size[1] - height) + 1))
            box = (left, top, left + width, top + height)  # beyond the picture it is 0
            crop = image.resize(size, Image.Resampling.BILINEAR).crop(box)
            labels = np.asarray(ids.resize(size, Image.Resampling.NEAREST).crop(box))
            found = [i for i in np.unique(labels).tolist() if i > 0 and not target.crowd[i - 1]]
        return {
            "pixel_values": self.processor(crop)["pixel_values"][0],
            "mask_labels": torch.from_numpy(labels == np.array(found)[:, None, None]),
            "class_labels": torch.tensor([target.classes[i - 1] for i in found]),
        }


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}


def optimizer_and_schedule(
    model: EomtDinov3ForUniversalSegmentation, args: argparse.Namespace
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Lower learning rates for earlier layers; what is new warms up first, then the backbone."""
    layers, blocks = model.config.num_hidden_layers, model.config.num_blocks
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, index = name.split(".")[:2]
        layer = int(index) if module == "layers" else 0 if module == "embeddings" else layers
        # the last layers, which the queries run through, have the full rate
        decay = args.llrd ** (layers - 1 - layer) if layer < layers - blocks else 1.0
        in_backbone = module in ("embeddings", "layers", "layernorm")
        groups.setdefault((in_backbone, args.lr * decay), []).append(parameter)

    def factor(in_backbone: bool, step: int) -> float:
        first, second = args.warmup
        start, warmup = (first, second) if in_backbone else (0, first)
        rising = max(0, step - start) / max(1, warmup)
        falling = (args.steps - step) / max(1, args.steps - start - warmup)
        return float(rising if step < start + warmup else max(0.0, falling) ** 0.9)

    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for (_, rate), parameters in groups.items()],
        weight_decay=0.05,
    )
    return optimizer, LambdaLR(optimizer, [partial(factor, group[0]) for group in groups])


def train(accelerator: Accelerator, pictures: Dataset, args: argparse.Namespace) -> Path:
    """Trains, and returns the folder of the model."""
    set_seed(args.seed, device_specific=True)
    model = EomtDinov3ForUniversalSegmentation.from_pretrained(
        args.model,
        dtype="float32",
        id2label=dict(enumerate(pictures.names)),
        stuff_classes=pictures.stuff,
        train_num_points=args.num_points,
        ignore_mismatched_sizes=True,
    )
    processor = EomtImageProcessor.from_pretrained(args.model, stuff_classes=pictures.stuff)
    count = args.steps * args.batch_size * accelerator.num_processes
    loader: Any = torch.utils.data.DataLoader(
        Crops(pictures, processor, args, count),
        args.batch_size,
        num_workers=args.workers,
        collate_fn=collate,
        generator=torch.Generator(),  # or it would draw from the one that a checkpoint restores
    )
    optimizer, schedule = optimizer_and_schedule(model, args)
    model.train().attn_mask_probs.fill_(1)  # masked attention is off in a converted model
    network = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)

    losses: list[Any] = []
    if args.resume:
        checkpoint = max(args.output.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        accelerator.load_state(str(checkpoint))
        losses = np.loadtxt(checkpoint / "losses.txt", ndmin=1).tolist()
    # one block after another, as in configs/dinov3/coco/instance/eomt_large_640.yaml
    blocks = network.config.num_blocks
    marks = [args.steps * (i + 1) // (blocks + 2) for i in range(blocks + 1)]
    batches = track(
        accelerator.skip_first_batches(loader, len(losses)),
        "Training",
        args.steps,
        completed=len(losses),
        disable=not accelerator.is_main_process,
    )
    for step, batch in enumerate(batches, len(losses) + 1):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        network.anneal_attention_masks(step, marks[:-1], marks[1:])
        losses.append(loss.detach())
        if step % args.save_every == 0 or step == args.steps:
            losses = [float(loss) for loss in losses]
            accelerator.print(f"step {step}: loss {np.mean(losses[-args.save_every :]):.2f}")
            save(accelerator, losses, args.output)
    if accelerator.is_main_process:
        network.save_pretrained(args.output / "model")
        processor.save_pretrained(args.output / "model")
    accelerator.wait_for_everyone()
    return Path(args.output / "model")


def save(accelerator: Accelerator, losses: list[float], folder: Path) -> None:
    """Saves a checkpoint in place of the one before, and draws the loss of the first process."""
    unfinished = folder / "unfinished-checkpoint"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        np.savetxt(unfinished / "losses.txt", losses)
        before = list(folder.glob("checkpoint-*"))
        unfinished.rename(folder / f"checkpoint-{len(losses)}")
        for checkpoint in before:
            shutil.rmtree(checkpoint)
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        width = max(1, len(losses) // 50)
        axes.plot(losses, alpha=0.3)
        axes.plot(
            np.arange(width - 1, len(losses)), np.convolve(losses, np.ones(width) / width, "valid")
        )
        axes.set(xlabel="step", ylabel=f"loss, and its mean over {width} steps", yscale="log")
        figure.savefig(folder / "loss.png")
    accelerator.wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a model on annotated pictures.")
    parser.add_argument("model", help="a converted model: a folder or a repository")
    for part in ("--train", "--val"):
        text = "folder with panoptic.json, panoptic (id maps) and images"
        parser.add_argument(part, type=Path, required=True, help=text)
    parser.add_argument("--output", type=Path, required=True, help="folder for what comes of it")
    parser.add_argument("--steps", type=int, default=10_000, help="default 10000")
    parser.add_argument("--batch-size", type=int, default=16, help="per device, default 16")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate, default 2e-4")
    parser.add_argument("--llrd", type=float, default=0.8, help="its decay per layer, default 0.8")
    parser.add_argument(
        "--warmup", type=int, nargs=2, help="steps for new parameters, then for the backbone"
    )
    parser.add_argument(
        "--scale", type=float, nargs=2, default=(0.1, 2.0), help="of crops, default 0.1 to 2.0"
    )
    parser.add_argument(
        "--num-points", type=int, default=12544, help="per mask in the loss, default 12544"
    )
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--workers", type=int, default=2, help="processes that read, default 2")
    parser.add_argument("--save-every", type=int, default=500, help="steps, default 500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in the output")
    args = parser.parse_args()
    if args.output.exists() != args.resume:
        parser.error(f"{args.output} " + ("does not exist" if args.resume else "exists: --resume?"))
    if args.warmup is None:  # the shares of the original's 2000 and 3000 steps, of 88716
        args.warmup = [args.steps * 2000 // 88716, args.steps * 3000 // 88716]

    accelerator = Accelerator(mixed_precision=args.precision)
    with open_dataset("coco-panoptic", args.train, max_annotation_bytes=1 << 30) as pictures:
        folder = train(accelerator, pictures, args)
    evaluation = evaluate(folder, "coco-panoptic", args.val)
    if accelerator.is_main_process:
        text = json.dumps(evaluation.to_dict(), indent=2)
        (args.output / "evaluation.json").write_text(text)
        for name, value in evaluation.metrics.items():
            print(f"{name:9} {value:.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
