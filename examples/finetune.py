"""Fine-tunes a model on pictures with annotations in COCO's panoptic format.

    python examples/finetune.py MODEL --train scenes/train --val scenes/val --output run

On several devices, `accelerate launch` takes the place of `python`. The recipe is that of
github.com/tue-mps/eomt (training/, datasets/transforms.py, configs/dinov3/), but in bfloat16 and
without torch.compile. The output folder gets the model, its figures, a picture of the loss, and a
checkpoint, which --resume continues.
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
from crops import Crops, collate
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from converter.pictures.datasets import Dataset, open_dataset
from converter.pictures.evaluation import evaluate
from reference_model import (
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtImageProcessor,
)

# what may differ when a training is resumed
FREE = {"output", "resume", "save_every", "workers"}


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
    classes = dict(enumerate(pictures.names))
    network = EomtDinov3ForUniversalSegmentation.from_pretrained(
        args.model,
        dtype="float32",
        id2label=classes,
        stuff_classes=pictures.stuff,
        train_num_points=args.num_points,
        ignore_mismatched_sizes=True,
    )
    if classes != EomtDinov3Config.from_pretrained(args.model).id2label:
        network.class_predictor.reset_parameters()
    network.train().attn_mask_probs.fill_(1)  # masked attention is off in a converted model
    processor = EomtImageProcessor.from_pretrained(
        args.model,
        stuff_classes=pictures.stuff,
        do_resize=True,
        do_pad=True,
        do_split_image=False,
    )
    count = args.steps * args.batch_size * accelerator.num_processes
    loader: Any = torch.utils.data.DataLoader(
        Crops(pictures, processor, args, count),
        args.batch_size,
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the one that a checkpoint restores
    )
    optimizer, schedule = optimizer_and_schedule(network, args)
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    losses: list[Any] = resume(accelerator, args) if args.resume else []
    schedule.last_epoch = len(losses)

    # one block after another, as in configs/dinov3/coco/instance/eomt_large_640.yaml
    blocks = network.config.num_blocks
    bounds = [args.steps * (i + 1) // (blocks + 2) for i in range(blocks + 1)]
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
        network.anneal_attention_masks(step, bounds[:-1], bounds[1:])
        losses.append(loss.detach())
        if step % args.save_every == 0 or step == args.steps:
            losses = [float(loss) for loss in losses]
            accelerator.print(f"step {step}: loss {np.mean(losses[-args.save_every :]):.2f}")
            save(accelerator, losses, args)
    if accelerator.is_main_process:
        network.save_pretrained(args.output / "model")
        processor.save_pretrained(args.output / "model")
    accelerator.wait_for_everyone()
    return Path(args.output / "model")


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def settings(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, str]:
    """What has to be the same when a training is resumed."""
    options = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    return options | {"number of processes": str(accelerator.num_processes)}


def save(accelerator: Accelerator, losses: list[float], args: argparse.Namespace) -> None:
    """Saves a checkpoint in place of the one before; all processes need the same folder."""
    unfinished = args.output / "unfinished-checkpoint"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress = {"losses": losses, "settings": settings(accelerator, args)}
        (unfinished / "progress.json").write_text(json.dumps(progress))
        before = checkpoints(args.output)
        unfinished.rename(args.output / f"checkpoint-{len(losses)}")
        for checkpoint in before:
            shutil.rmtree(checkpoint)
        draw(losses, args.output / "loss.png")
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, args: argparse.Namespace) -> list[float]:
    """Loads the last checkpoint, and returns the losses so far."""
    checkpoint = checkpoints(args.output)[-1]
    progress = json.loads((checkpoint / "progress.json").read_text())
    now = settings(accelerator, args)
    for name, value in progress["settings"].items():
        if now[name] != value:
            raise SystemExit(f"{checkpoint} was made with another {name}: {value}")
    accelerator.load_state(str(checkpoint))
    return list(progress["losses"])


def draw(losses: list[float], path: Path) -> None:
    """Draws the loss of the first process, and its running mean."""
    width = max(1, len(losses) // 50)
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, alpha=0.3)
    axes.plot(np.arange(width, len(losses) + 1), mean)
    axes.set(xlabel="step", ylabel=f"loss, and its mean over {width} steps", yscale="log")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a model on annotated pictures.")
    parser.add_argument("model", help="a converted model: a folder or a repository")
    for part in ("--train", "--val"):
        text = "folder with panoptic.json, panoptic (id maps) and images"
        parser.add_argument(part, type=Path, required=True, help=text)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for the model, its figures and checkpoints",
    )
    parser.add_argument("--steps", type=int, default=10_000, help="default 10000")
    parser.add_argument("--batch-size", type=int, default=16, help="per device, default 16")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate, default 2e-4")
    parser.add_argument("--llrd", type=float, default=0.8, help="its decay per layer, default 0.8")
    parser.add_argument(
        "--warmup", type=int, nargs=2, help="steps for new parameters, then for the backbone"
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        default=(0.1, 2.0),
        help="of pictures, 1 to fit, default 0.1 2.0",
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
    if args.resume and not checkpoints(args.output):
        parser.error(f"{args.output} has no checkpoint")
    if not args.resume and args.output.exists() and any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty; --resume continues a training")
    for folder in (args.train, args.val):
        # COCO's own layout has the validation pictures only, in zips that processes cannot share
        if not (folder / "panoptic.json").is_file() or (folder / "annotations").exists():
            parser.error(f"{folder} must have panoptic.json, panoptic and images")
    if args.warmup is None:  # the shares of the original's 2000 and 3000 steps, of 88716
        args.warmup = [args.steps * 2000 // 88716, args.steps * 3000 // 88716]

    with open_dataset("coco-panoptic", args.val) as pictures:
        measured = pictures.names, pictures.stuff
    accelerator = Accelerator(mixed_precision=args.precision)
    with open_dataset("coco-panoptic", args.train, max_annotation_bytes=1 << 30) as pictures:
        if (pictures.names, pictures.stuff) != measured:
            parser.error("--train and --val have different classes")
        if not len(pictures):
            parser.error(f"{args.train} has no annotated picture")
        folder = train(accelerator, pictures, args)
    accelerator.free_memory()
    evaluation = evaluate(folder, "coco-panoptic", args.val)
    if accelerator.is_main_process:
        text = json.dumps(evaluation.to_dict(), indent=2)
        (args.output / "evaluation.json").write_text(text)
        for name, value in evaluation.metrics.items():
            print(f"{name:9} {value:.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
