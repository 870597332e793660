"""CLIP as an image classifier: its vision tower and projection, and a frozen head made of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModelWithProjection
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

STORED_AS = "CLIPVisionModelWithProjection"  # the transformers class that opens what is saved here


class ClipClassifier(CLIPPreTrainedModel):  # type: ignore[misc, unused-ignore]
    """Logits are the products of the normalised image feature with the head's rows, one per class."""

    base_model_prefix = "clip"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        config.vision_config.projection_dim = config.projection_dim  # the one that counts in a whole CLIP model
        self.clip = CLIPVisionModelWithProjection._from_config(config.vision_config)
        self.classifier = torch.nn.Linear(config.projection_dim, config.num_labels, bias=False)
        self.classifier.weight.requires_grad_(False)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: Any = None, **_: Any) -> ImageClassifierOutput:
        """Classify images; labels are for the trainer, which computes the loss itself."""
        features = self.clip(pixel_values).image_embeds
        return ImageClassifierOutput(logits=self.classifier(features / features.norm(dim=-1, keepdim=True)))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Save tower and projection under CLIP's own names, and the head beside them as `classifier.weight`."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name.removeprefix("clip."): tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.config.architectures = [STORED_AS]
        self.config.save_pretrained(folder)
