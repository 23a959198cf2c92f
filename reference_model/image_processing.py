"""EomtImageProcessor: pictures to pixel values, outputs to segments, both as in the original.

Source: github.com/tue-mps/eomt training/lightning_module.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reference_model.allowed import MAX_IMAGE_SIDE, is_int, is_number, refusal
from reference_model.config import EomtDinov3Config
from reference_model.files import fetch_file, json_text, read_json_object, write_json_object
from reference_model.outputs import EomtDinov3ForUniversalSegmentationOutput
from reference_model.pictures import Picture, flatten, read_picture
from reference_model.post_processing import (
    Placement,
    Window,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from reference_model.training_labels import Classes, maps_and_classes, masks_and_classes

PREPROCESSOR_CONFIG_NAME = "preprocessor_config.json"
IMAGE_PROCESSOR_TYPE = "EomtImageProcessor"
# of a segment's score, as in transformers and the original (mask_classification_panoptic.py)
THRESHOLD = 0.8

Size: TypeAlias = Mapping[str, int | None]


class BatchFeature(dict[str, Any]):
    """Values by name, also as attributes; `model(**inputs)` passes them to a model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the tensors as `Tensor.to` does; only floating point ones change their dtype."""
        self.update({name: _move(value, *args, **kwargs) for name, value in self.items()})
        return self


@dataclass(kw_only=True)
class EomtImageProcessor:
    """EoMT's image processor, with the names, arguments and defaults of transformers'.

    Invalid values raise ValueError, also where an attribute is set later.

    Attributes:
        do_resize: whether pictures are resized: to fit into `size` or, with `do_split_image`, to
            cover it.
        size: of the network's input in pixels: `height` and `width`; or `shortest_edge` (height)
            and `longest_edge` (width), where `shortest_edge` alone, or a number, gives a square.
        resample: PIL's number of an interpolation, done on 8 bits per channel; 2 is bilinear.
        do_rescale, rescale_factor: whether pixel values from 0 to 255 are multiplied by the factor.
        do_normalize, image_mean, image_std: whether the mean is subtracted and the rest divided
            by the standard deviation, per channel.
        do_pad: whether pictures are padded to `size`, with black below and on the right.
        do_split_image: whether windows of `size` slide along the picture's longer side, as in the
            original's evaluation of semantic segmentation.
        ignore_index: if given, id 0 of segmentation maps is ignored, as is the class of this
            number, and the other ids are classes (or instances) counted from 1.
        stuff_classes: ids of classes without instances; None if they are unknown.
    """

    do_resize: bool = True
    size: Size = field(default_factory=lambda: {"shortest_edge": 640, "longest_edge": 640})
    resample: int = Image.Resampling.BILINEAR.value
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)  # ImageNet's, as in DINOv3
    image_std: Sequence[float] = (0.229, 0.224, 0.225)
    do_pad: bool = False
    do_split_image: bool = False
    ignore_index: int | None = None
    stuff_classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        size: Any = self.size
        if is_int(size):
            object.__setattr__(self, "size", {"shortest_edge": size})
        self._check_size()
        known = [method.value for method in Image.Resampling]
        if not is_int(self.resample) or self.resample not in known:
            raise refusal("resample", self.resample, f"one of PIL's numbers {known}")
        for name in ("do_resize", "do_rescale", "do_normalize", "do_pad", "do_split_image"):
            if not isinstance(getattr(self, name), bool):
                raise refusal(name, getattr(self, name), "true or false")
        if not is_number(self.rescale_factor):
            raise refusal("rescale_factor", self.rescale_factor, "a number")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not (
                isinstance(values, list | tuple)
                and len(values) == 3
                and all(map(is_number, values))
                and (name == "image_mean" or min(values) > 0)
            ):
                raise refusal(name, values, "three numbers, above 0 in image_std")
        if self.do_split_image and not self.do_resize:
            raise ValueError("do_split_image needs do_resize: windows slide over resized pictures")
        for name in ("image_mean", "image_std", "stuff_classes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; once all are set, only to a value that fits the others."""
        if name in vars(self) or name not in self.__dataclass_fields__:
            value = getattr(replace(self, **{name: value}), name)
        object.__setattr__(self, name, value)

    def _check_size(self) -> None:
        size: Any = self.size
        given = {}
        if isinstance(size, Mapping):
            given = {edge: pixels for edge, pixels in size.items() if pixels is not None}
        if set(given) not in (
            {"height", "width"},
            {"shortest_edge"},
            {"shortest_edge", "longest_edge"},
        ) or not all(is_int(pixels) and 0 < pixels <= MAX_IMAGE_SIDE for pixels in given.values()):
            expected = (
                f"numbers of pixels from 1 to {MAX_IMAGE_SIDE:,} for height and width, or for "
                "shortest_edge and longest_edge"
            )
            raise refusal("size", size, expected)

    @property
    def image_size(self) -> tuple[int, int]:
        """`size` as (height, width) in pixels."""
        height = self.size.get("height") or self.size["shortest_edge"] or 0
        return height, self.size.get("width") or self.size.get("longest_edge") or height

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **settings: Any,
    ) -> Self:
        """Reads preprocessor_config.json of a folder or a Hub repository.

        Stuff classes that the file does not name come from the config.json beside it, if any.

        Args:
            pretrained_model_name_or_path: a folder, or a repository's id.
            revision: a branch, tag or commit of the repository.
            token: for the Hub; by default that of the login.
            cache_dir: where downloads are kept.
            local_files_only: use the cache and do not connect.
            force_download: download again what is in the cache.
            settings: attributes that replace those of the file.

        Raises:
            FileNotFoundError: the folder has no preprocessor_config.json.
            ValueError: a file cannot be read, has a value that cannot work, or belongs to another
                image processor.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        path = fetch_file(pretrained_model_name_or_path, PREPROCESSOR_CONFIG_NAME, **hub)
        try:
            processor = cls.from_dict(read_json_object(path), **settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if processor.stuff_classes is None and "stuff_classes" not in settings:
            try:
                config = EomtDinov3Config.from_pretrained(pretrained_model_name_or_path, **hub)
                processor.stuff_classes = config.stuff_classes
            except (FileNotFoundError, EntryNotFoundError):
                pass
        return processor

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **settings: Any) -> Self:
        """The processor that a parsed preprocessor_config.json describes.

        Args:
            values: the parsed file; null means the default, and other keys are left out.
            settings: attributes that replace those of the file.

        Raises:
            ValueError: a value cannot work, or the file belongs to another image processor.
            TypeError: there is no such attribute.
        """
        kind = values.get("image_processor_type", IMAGE_PROCESSOR_TYPE)
        if not str(kind).startswith(IMAGE_PROCESSOR_TYPE):  # it may end in Fast or Pil
            raise ValueError(f"it is for {kind}; expected {IMAGE_PROCESSOR_TYPE}")
        size = values.get("size")
        if size is not None and not isinstance(size, Mapping):
            # transformers takes a number in a file for the shorter side alone
            raise ValueError(f"size is {size!r}; expected such as {{'shortest_edge': 640}}")
        own = {entry.name for entry in fields(cls)}
        known = {name: value for name, value in values.items() if name in own and value is not None}
        return cls(**known | settings)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes preprocessor_config.json, which transformers reads too, into a folder."""
        write_json_object(Path(save_directory) / PREPROCESSOR_CONFIG_NAME, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json."""
        values = {**asdict(self), "image_processor_type": IMAGE_PROCESSOR_TYPE}
        if self.stuff_classes is None:
            del values["stuff_classes"]
        return values

    def to_json_string(self) -> str:
        """The text of preprocessor_config.json."""
        return json_text(self.to_dict())

    def __call__(
        self,
        images: Picture | Sequence[Any],
        segmentation_maps: Picture | Sequence[Any] | None = None,
        instance_id_to_semantic_id: Classes | Sequence[Classes] | None = None,
        *,
        return_tensors: str = "pt",
        input_data_format: str | None = None,
        do_convert_rgb: bool = True,
        **settings: Any,
    ) -> BatchFeature:
        """Turns pictures, and segmentation maps if they are given, into inputs of the model.

        Args:
            images: one picture or several: PIL images, paths, open files, or arrays and tensors of
                8 or 16 bits, (height, width), or with 1, 3 or 4 channels first or last; a fourth
                dimension in front is the batch. Grey, palette, 16-bit and CMYK pictures become RGB;
                transparent pixels are laid over black. The EXIF orientation is applied to files,
                not to PIL images.
            segmentation_maps: for every picture, an id per pixel: (height, width).
            instance_id_to_semantic_id: the class of each id, if ids are not classes; one mapping,
                or one for each picture.
            return_tensors: always "pt".
            input_data_format: "channels_first" or "channels_last", where an array's shape is
                ambiguous.
            do_convert_rgb: always true.
            settings: attributes that replace the processor's for this call.

        Returns:
            pixel_values: (batch, 3, height, width) float32, in channels-last memory format.
            patch_offsets: with do_split_image, for every window of the batch a tensor (picture,
                start, end): the pixels of the resized picture's longer side that it lies between.
            mask_labels: with segmentation maps, for every element of the batch
                (segments, height, width) float32, 1 inside.
            class_labels: likewise, (segments,) int64.

        Raises:
            ValueError: an input has an unsupported shape or type, or inputs without padding differ
                in size.
        """
        if return_tensors != "pt":
            expected = '"pt": a tensor becomes a NumPy array with .numpy()'
            raise refusal("return_tensors", return_tensors, expected)
        if do_convert_rgb is not True:
            raise refusal("do_convert_rgb", do_convert_rgb, "true: models take pictures in RGB")
        processor = replace(self, **settings)
        pictures = [read_picture(image, input_data_format) for image in flatten(images, 3)]
        inputs, offsets = [], []
        for index, picture in enumerate(pictures):
            for start, end, pixels in processor._inputs(picture, processor.resample):
                inputs.append(pixels)
                offsets.append(torch.tensor([index, start, end]))
        if len({pixels.shape for pixels in inputs}) != 1:
            sizes = sorted({pixels.shape[:2] for pixels in inputs})
            raise ValueError(
                f"inputs have the sizes {sizes}, (height, width); expected one: pad them"
            )
        features = BatchFeature(pixel_values=processor._normalise(np.stack(inputs)))
        if processor.do_split_image:
            features["patch_offsets"] = offsets
        if segmentation_maps is not None:
            sizes = [picture.size for picture in pictures]
            labels = [
                masks_and_classes(ids, classes, processor.ignore_index)
                for segmentation_map, classes in maps_and_classes(
                    segmentation_maps, instance_id_to_semantic_id, sizes
                )
                for _, _, ids in processor._inputs(segmentation_map, Image.Resampling.NEAREST)
            ]
            features["mask_labels"] = [masks for masks, _ in labels]
            features["class_labels"] = [classes for _, classes in labels]
        return features

    preprocess = __call__

    def resized(self, picture: Image.Image, resample: int | None = None) -> Image.Image:
        """A picture in the size that it has in the network's input; resized again, it stays equal.

        Args:
            picture: with do_resize false, it is returned as it is.
            resample: PIL's number of an interpolation; by default the processor's.
        """
        if not self.do_resize:
            return picture
        height, width = self._scaled_size((picture.height, picture.width))
        method = self.resample if resample is None else resample
        return picture.resize((width, height), Image.Resampling(method))

    @torch.no_grad()
    def post_process_semantic_segmentation(
        self,
        outputs: EomtDinov3ForUniversalSegmentationOutput,
        target_sizes: Sequence[tuple[int, int]],
        size: Size | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Every pixel's class.

        Args:
            outputs: of the model, for pictures or for windows on them.
            target_sizes: (height, width) of every picture, in pixels.
            size: the processor's size for these inputs, if it differs from `self.size`.
            return_segmentation_scores: also give the scores of all classes.

        Returns:
            For every picture a tensor (height, width) int64; with scores, a BatchFeature of it as
            `segmentation` and of `segmentation_scores`, (classes, height, width) float32.

        Raises:
            ValueError: the number of target sizes is not the number of pictures.
        """
        masks, classes = outputs.masks_queries_logits, outputs.class_queries_logits
        offsets = [(index, 0, 0) for index in range(len(masks))]
        if outputs.patch_offsets:
            offsets = [(int(n), int(start), int(end)) for n, start, end in outputs.patch_offsets]
        _check_targets(target_sizes, 1 + max(picture for picture, _, _ in offsets))
        # windows may have been asked for in the call that made the inputs
        processor = replace(self, do_split_image=True) if outputs.patch_offsets else self
        placements = processor._placements(target_sizes, size)
        windows: list[list[Window]] = [[] for _ in placements]
        for index, (picture, start, _) in enumerate(offsets):
            down = placements[picture].scaled_size[0] > placements[picture].input_size[0]
            top, left = (start, 0) if down else (0, start)
            windows[picture].append(Window(masks[index], classes[index], top, left))
        results = [
            semantic_segmentation(entry, placement, return_scores=return_segmentation_scores)
            for entry, placement in zip(windows, placements, strict=True)
        ]
        if return_segmentation_scores:
            return [BatchFeature(segmentation=m, segmentation_scores=s) for m, s in results]
        return [segmentation for segmentation, _ in results]

    @torch.no_grad()
    def post_process_panoptic_segmentation(
        self,
        outputs: EomtDinov3ForUniversalSegmentationOutput,
        target_sizes: Sequence[tuple[int, int]],
        threshold: float = THRESHOLD,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        stuff_classes: Collection[int] | None = None,
        size: Size | None = None,
    ) -> list[dict[str, Any]]:
        """Every pixel's segment, of things and of stuff.

        Args:
            outputs: of the model.
            target_sizes: (height, width) of every picture, in pixels.
            threshold: what a query's class probability must exceed.
            mask_threshold: the least mask probability of a pixel inside a mask.
            overlap_mask_area_threshold: the least share of a mask's area that its query keeps once
                every pixel belongs to one query.
            stuff_classes: ids of the classes whose segments are merged into one; by default the
                processor's, if any.
            size: the processor's size for these inputs, if it differs from `self.size`.

        Returns:
            For every picture `segmentation`, (height, width) int64, ids of segments or -1 for
            none, and `segments_info` with `id`, `label_id` and `score` of each.

        Raises:
            ValueError: the number of target sizes is not the number of pictures.
        """
        if stuff_classes is None:
            stuff_classes = self.stuff_classes or ()
        _check_targets(target_sizes, len(outputs.masks_queries_logits))
        return [
            panoptic_segmentation(
                masks,
                classes,
                placement,
                threshold=threshold,
                mask_threshold=mask_threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                stuff_classes=stuff_classes,
            )
            for masks, classes, placement in zip(
                outputs.masks_queries_logits,
                outputs.class_queries_logits,
                self._placements(target_sizes, size),
                strict=True,
            )
        ]

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: EomtDinov3ForUniversalSegmentationOutput,
        target_sizes: Sequence[tuple[int, int]],
        threshold: float | None = None,
        size: Size | None = None,
        top_k: int | None = None,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """Instances, each with its mask; masks may overlap.

        Args:
            outputs: of the model.
            target_sizes: (height, width) of every picture, in pixels.
            threshold: the least score; by default 0.8, and none with top_k.
            size: the processor's size for these inputs, if it differs from `self.size`.
            top_k: instead of every query's best class, take this many of all pairs of a query and
                a class, those of the largest class probability, best first; also pairs whose mask
                is empty. The original evaluates with 100.
            return_binary_maps: also give the masks.

        Returns:
            For every picture `segmentation`, (height, width) int64, ids of segments or -1 for
            none; where masks overlap, it has the id of one of them. `segments_info` with `id`,
            `label_id` and `score` of each; on request `binary_maps`, (segments, height, width)
            bool, by id.

        Raises:
            ValueError: the number of target sizes is not the number of pictures.
        """
        if threshold is None:
            threshold = THRESHOLD if top_k is None else 0.0
        _check_targets(target_sizes, len(outputs.masks_queries_logits))
        return [
            instance_segmentation(
                masks,
                classes,
                placement,
                threshold=threshold,
                top_k=top_k,
                return_binary_maps=return_binary_maps,
            )
            for masks, classes, placement in zip(
                outputs.masks_queries_logits,
                outputs.class_queries_logits,
                self._placements(target_sizes, size),
                strict=True,
            )
        ]

    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a picture after resizing, rounded as in the original."""
        if not self.do_resize:
            return size
        factors = [ours / theirs for ours, theirs in zip(self.image_size, size, strict=True)]
        factor = max(factors) if self.do_split_image else min(factors)
        height, width = (max(1, round(side * factor)) for side in size)
        return height, width

    def _placements(
        self, target_sizes: Sequence[tuple[int, int]], size: Size | None
    ) -> list[Placement]:
        """Where pictures of these sizes are in the inputs that the processor makes of them."""
        processor = self if size is None else replace(self, size=size)
        placements = []
        for height, width in target_sizes:
            target = int(height), int(width)
            scaled = input_size = processor._scaled_size(target)
            if processor.do_split_image:
                input_size = processor.image_size
            elif processor.do_pad:
                input_size = processor._padded_size(scaled)
            placements.append(Placement(input_size, scaled, target))
        return placements

    def _padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.image_size
        return max(height, size[0]), max(width, size[1])

    def _inputs(self, image: Image.Image, resample: int) -> list[tuple[int, int, NDArray[Any]]]:
        """The resized image, padded or cut into windows: (start, end, pixels) of each."""
        pixels = np.asarray(self.resized(image, resample))
        height, width = pixels.shape[:2]
        if self.do_pad:
            padded_height, padded_width = self._padded_size((height, width))
            sides = [(0, padded_height - height), (0, padded_width - width)]
            pixels = np.pad(pixels, sides + [(0, 0)] * (pixels.ndim - 2))
        if not self.do_split_image:
            return [(0, width, pixels)]

        down = height > self.image_size[0]
        length, window = (height, self.image_size[0]) if down else (width, self.image_size[1])
        count = math.ceil(length / window)
        starts = [index * (length - window) // max(1, count - 1) for index in range(count)]
        ranges = [slice(start, start + window) for start in starts]
        return [(cut.start, cut.stop, pixels[cut] if down else pixels[:, cut]) for cut in ranges]

    def _normalise(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Pixels (batch, height, width, 3) as the network's input, (batch, 3, height, width).

        With the default values, this equals the original's (pixels / 255 - mean) / std in float32,
        bit for bit. The memory format stays that of decoded pictures, because it affects how the
        patch embedding rounds.
        """
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self.do_rescale:
            values = values.double() * self.rescale_factor
        values = values.float()
        if self.do_normalize:
            mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
            values = (values - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return values


def _check_targets(target_sizes: Sequence[tuple[int, int]], pictures: int) -> None:
    if len(target_sizes) != pictures:
        raise ValueError(
            f"there are {len(target_sizes)} target_sizes; expected {pictures}, one per picture"
        )


def _move(value: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(value, list):
        return [_move(entry, *args, **kwargs) for entry in value]
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return value.to(*args, **kwargs)
    return value.to(value.new_empty(0, dtype=torch.float32).to(*args, **kwargs).device)
