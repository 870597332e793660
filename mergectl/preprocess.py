"""Turn a task's rows into what a model reads: token ids or pixels, padded per batch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergectl import decoders
from mergectl.checkpoints import read_json
from mergectl.errors import UserError, did_you_mean
from mergectl.tokenizer_files import open_tokenizer, save_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mergectl.benchmarks._contract import Task

MAX_LENGTH = 128  # tokens of a text or a pair of texts, where nothing else is said
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Example = dict[str, Any]


class Preparer(Protocol):
    """What a model reads: made once per model, used by training and evaluation alike."""

    def prepare(self, task: Task, columns: Mapping[str, Sequence[Any]]) -> list[Example]:
        """Rows to examples; this is the slow part and is done once."""

    def length(self, example: Example) -> int:
        """How long an example is: batches are made of neighbours in length."""

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Examples to one batch to learn from."""

    def stack(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Examples to one batch to score, kept as small as may be."""

    def finish(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The last cheap step before the model, on the model's device."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer or image settings into a model folder."""


@dataclass(frozen=True)
class TextPreparer:
    """Token ids of one text or a pair, cut at `max_length` and padded to the longest of the batch."""

    tokenizer: Any
    max_length: int
    pad: int
    segments: bool  # the model reads `token_type_ids`
    ids_only: bool = False  # token ids alone, padded to `max_length`: padding is read, pairs are not told apart

    def prepare(self, task: Task, columns: Mapping[str, Sequence[Any]]) -> list[Example]:
        """Tokenise all rows at once."""
        texts = [[str(text) for text in columns[name]] for name in task.inputs]
        if not texts[0]:
            return []
        found = self.tokenizer(
            *texts, truncation=True, max_length=self.max_length, return_attention_mask=False,
            return_token_type_ids=self.segments,
        )  # fmt: skip
        names = ["input_ids", *(["token_type_ids"] if self.segments else [])]
        rows = zip(*(found[name] for name in names), strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def length(self, example: Example) -> int:
        """The number of tokens."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Pad on the right; an empty text becomes one padding token, so that the model has something to read."""
        import numpy as np

        lengths = np.array([max(len(e["input_ids"]), 1) for e in examples])
        width = self.max_length if self.ids_only else lengths.max()
        mask = np.arange(width)[None, :] < lengths[:, None]
        batch = {"input_ids": np.full(mask.shape, self.pad), "attention_mask": mask.astype(np.int64)}
        if self.segments:
            batch["token_type_ids"] = np.zeros(mask.shape, np.int64)
        for row, example in enumerate(examples):
            for name in batch.keys() - {"attention_mask"}:
                values = example[name]
                batch[name][row, : len(values)] = values
        if self.ids_only:
            batch = {"input_ids": batch["input_ids"]}
        return _with_labels(batch, examples)

    def stack(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Texts are scored as they are learnt from."""
        return self.collate(examples)

    def finish(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Nothing is left to do for texts."""
        return dict(batch)

    def save(self, folder: Path) -> None:
        """Save the tokenizer, without the cut-off that training had set on it."""
        save_tokenizer(self.tokenizer, folder)


INPUTS = ("full", "ids_only")


def check_inputs(inputs: str) -> None:
    """Refuse a word for what models read that is none."""
    if inputs not in INPUTS:
        raise UserError(f"--inputs must be {' or '.join(INPUTS)}, got '{inputs}'.{did_you_mean(inputs, INPUTS)}")


def with_inputs(preparer: Preparer, inputs: str) -> Preparer:
    """A preparer that gives a model all it reads, or token ids alone, as the alpha study's search did."""
    check_inputs(inputs)
    if inputs == "full":
        return preparer
    if not isinstance(preparer, TextPreparer):
        raise UserError("--inputs ids_only is for texts that are answered with a label.")
    return replace(preparer, ids_only=True)


@dataclass(frozen=True)
class ImagePreparer:
    """Pixels of the model's size and number of channels, kept small and normalised per batch.

    Images are squeezed into the size or, with `edge`, resized until their shorter side is so long and cut around the
    centre, as CLIP does it.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    edge: int | None = None

    def prepare(self, task: Task, columns: Mapping[str, Sequence[Any]]) -> list[Example]:
        """Resize every image; whole numbers are read as 0..255, real ones as 0..1.

        Large ones wait as the bytes of their files until their batch is made.
        """
        if self.edge is not None:
            return [{"image": _encoded(image)} for image in columns[task.inputs[0]]]
        return [{"pixels": self._pixels(image)} for image in columns[task.inputs[0]]]

    def length(self, example: Example) -> int:
        """All images are of one size."""
        return 1

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack the images and normalise them."""
        return self.finish(self.stack(examples))

    def stack(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Stack the images as they are: bytes stay bytes."""
        import numpy as np

        pixels = [e["pixels"] if "pixels" in e else self._pixels(e["image"]) for e in examples]
        return _with_labels({"pixels": np.stack(pixels)}, examples)

    def finish(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bytes or shares to normalised float32 pixels."""
        import torch

        pixels = batch["pixels"]
        scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        rest = {name: tensor for name, tensor in batch.items() if name != "pixels"}
        return {"pixel_values": (pixels.float() / scale - mean) / std, **rest}

    def save(self, folder: Path) -> None:
        """Write the settings as transformers' own image processors read them."""
        size = {"height": self.height, "width": self.width}
        how = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2}
        if self.edge is not None:
            how = {
                "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": self.edge}, "resample": 3,
                "do_center_crop": True, "crop_size": size, "do_convert_rgb": True,
            }  # fmt: skip
        settings = {
            **how, "do_resize": True,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _pixels(self, image: Any) -> np.ndarray[Any, Any]:
        """One image as [channels, height, width], uint8 or float32."""
        import numpy as np

        array = np.asarray(self._resized(image))
        if array.ndim == 2:
            array = array[:, :, None]
        if array.shape[2] != self.channels:
            array = np.repeat(array[:, :, :1], self.channels, axis=2)
        whole = np.issubdtype(array.dtype, np.integer)
        return np.ascontiguousarray(array.transpose(2, 0, 1).astype(np.uint8 if whole else np.float32))

    def _resized(self, image: Any) -> Any:
        import numpy as np
        from PIL import Image

        if isinstance(image, Mapping):  # a Parquet image: its PNG or JPEG bytes
            image = Image.open(io.BytesIO(image["bytes"]))
        if isinstance(image, Image.Image):
            return self._fitted(image.convert("L" if self.channels == 1 else "RGB"))
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[2] != 1 and self.channels == 1:
            array = array[:, :, :3].mean(axis=2).astype(array.dtype)
        if array.shape[:2] == (self.height, self.width):
            return array
        planes = np.moveaxis(np.atleast_3d(array), 2, 0)
        sized = [self._fitted(Image.fromarray(plane.astype(np.float32))) for plane in planes]
        return np.stack([np.asarray(plane) for plane in sized], axis=2).astype(array.dtype)

    def _fitted(self, picture: Any) -> Any:
        """A picture in the model's size."""
        from PIL import Image

        if self.edge is None:
            return picture.resize((self.width, self.height), Image.Resampling.BILINEAR)
        width, height = picture.size
        short = min(width, height)
        wide, high = int(self.edge * width / short), int(self.edge * height / short)
        left, top = (wide - self.width) // 2, (high - self.height) // 2
        sized = picture.resize((wide, high), Image.Resampling.BICUBIC)
        return sized.crop((left, top, left + self.width, top + self.height))


def _encoded(image: Any) -> Any:
    """An image that was not decoded yet as its file's bytes; any other as it is."""
    file = getattr(image, "fp", None)
    return {"bytes": file.getvalue()} if isinstance(file, io.BytesIO) else image


def _with_labels(batch: Mapping[str, np.ndarray[Any, Any]], examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if examples and "labels" in examples[0]:
        labels = [e["labels"] for e in examples]
        tensors["labels"] = torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.long)
    return tensors


def text_preparer(folder: Path | None, ref: str, config: Any, max_length: int | None = None) -> TextPreparer:
    """Open the tokenizer of a model folder and fit it to the model: padding, length, segments."""
    tokenizer = open_tokenizer(folder, ref)
    rows = config.vocab_size
    if len(tokenizer) > rows:
        raise UserError(f"{ref}: its tokenizer has {len(tokenizer)} tokens but the model only {rows}. Use its own.")
    if tokenizer.pad_token_id is None:  # GPT-2 has none; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    config.pad_token_id = tokenizer.pad_token_id
    offset = tokenizer.pad_token_id + 1 if "roberta" in config.model_type else 0  # RoBERTa's positions start after it
    limit = (getattr(config, "max_position_embeddings", None) or 10**9) - offset
    decoder = decoders.is_decoder(config)
    if decoder:  # its positions count from the left, also for those who use the saved tokenizer
        tokenizer.padding_side = "right"
    usual = decoders.USUAL_LENGTH if decoder else MAX_LENGTH
    length = min(max_length or usual, limit, tokenizer.model_max_length)
    if length < 4:
        raise UserError(f"{ref} reads at most {length} tokens, too few for a text.")
    segments = "token_type_ids" in tokenizer.model_input_names and (getattr(config, "type_vocab_size", 0) or 0) > 1
    return TextPreparer(tokenizer, length, tokenizer.pad_token_id, segments)


def image_preparer(folder: Path | None, ref: str, config: Any) -> ImagePreparer:
    """The image size and channels of the model, and the normalisation written beside it, if any."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise UserError(f"{ref}: its configuration names no image_size.")
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    channels = int(getattr(vision, "num_channels", 3))
    path = None if folder is None else folder / "preprocessor_config.json"
    found = read_json(path) if path is not None and path.exists() else {}
    clip = config.model_type == "clip"
    usual = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD} if clip and channels == 3 else {}
    mean, std = (found.get(name) or usual.get(name) or [] for name in ("image_mean", "image_std"))
    edge = _edge(found, min(height, width)) if found.get("do_center_crop", clip) else None
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or not found.get("do_normalize", True):
        return ImagePreparer(height, width, channels, edge=edge)
    return ImagePreparer(height, width, channels, tuple(mean), tuple(std), edge)


def _edge(settings: Mapping[str, Any], usual: int) -> int:
    """How long an image's shorter side is made before it is cut."""
    size = settings.get("size", usual)
    return int(size.get("shortest_edge", usual) if isinstance(size, Mapping) else size)
