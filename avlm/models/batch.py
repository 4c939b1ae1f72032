"""What the model sees: one packed row of tokens with its media. Every tensor is made in the loader, on the CPU.

T tokens of the row   R rows that carry a target   I images   F image feature rows (F = I * features of an image)
C audio windows   M mel bins   W frames of a window   K audio rows kept after the convolutions   G audio feature rows
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.segments import Segments

IGNORE = -100  # target: nothing is learned here
IMAGE = -200  # token: an image feature goes here
AUDIO = -300  # token: an audio feature goes here

KINDS = ("text", "image", "audio", "video", "mixed")  # modality class of a sample: what the loss is reported by


@dataclass(frozen=True)
class Batch:
    """One packed row. Shapes are checked here, once; nobody checks them again.

    token_T        int64: vocabulary ids, IMAGE or AUDIO
    position_T     int64: position within the document, from 0
    segments       documents
    target_rows_R  int64: rows with a target, ascending
    target_R       int64: the token that follows, at those rows
    kind_R         int64: index into KINDS of the sample that the target belongs to
    pixels         float32 (I, 3, S, S), normalised
    image_segments patch tokens of each image (the class token counted), before the features are selected
    patch_rows_F   int64 (F, downsample^2): rows of the tower's output that make each image feature
    image_rows_F   int64: row of token_T that each image feature is written to, in the order of ``pixels``
    mel            float32 (C, M, W): log-mel windows, frames past the clip exactly 0; or columns (``log_mel``)
    mel_rows_K     int64: rows of the flattened (C, W / 2) convolution output that belong to a clip
    audio_segments the kept rows of each window
    frame_rows_G   int64 (G, downsample): kept rows that make each audio feature; -1 pads the last of a window
    audio_rows_G   int64: row of token_T that each audio feature is written to
    keys           sample keys of the row; ``skipped``: (key, reason) of samples dropped since the last batch
    read           samples read since the last batch, the skipped ones included
    """

    token_T: Tensor
    position_T: Tensor
    segments: Segments
    target_rows_R: Tensor
    target_R: Tensor
    kind_R: Tensor
    pixels: Tensor
    image_segments: Segments
    patch_rows_F: Tensor
    image_rows_F: Tensor
    mel: Tensor
    mel_rows_K: Tensor
    audio_segments: Segments
    frame_rows_G: Tensor
    audio_rows_G: Tensor
    keys: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    read: int = 0

    def __post_init__(self) -> None:
        T = self.token_T.shape[0]
        assert self.position_T.shape == (T,)
        assert self.target_rows_R.shape == self.target_R.shape == self.kind_R.shape
        assert self.pixels.ndim == 4 and len(self.image_segments) == self.pixels.shape[0]
        assert self.mel.ndim == 3 and len(self.audio_segments) == self.mel.shape[0] and self.mel.shape[2] % 2 == 0
        assert self.patch_rows_F.shape[0] == self.image_rows_F.shape[0]
        assert self.frame_rows_G.shape[0] == self.audio_rows_G.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without what fills the end of the row."""
        return self.segments.cu_seqlens[len(self.keys)].item()

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting when its memory is pinned."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # Tensors, segments, and what stands in their place where rows are shared.
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if hasattr(value, "to")}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {
            f.name: getattr(self, f.name).pin_memory()
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)
