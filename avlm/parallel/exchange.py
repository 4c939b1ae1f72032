"""Tower rows travel from the rank that encoded them to the rank that holds the token of their feature.

    arrived = rows that the ranks send here, rank after rank        d features[send_rows] = d arrived, sent back

It is a hook after the tower or its resampler, so that neither these nor the projector know of it: the projector's
sources index the rows that have arrived. The backward is a collective like the forward; ranks with nothing to send or
receive join it too.

P rows of the tower's output   S of them that are sent   A rows that arrive   D tower width
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from avlm.models.avlm import AVLM
from avlm.models.batch import Media
from kernels.segments import Segments


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutedSegments(Segments):
    """The images or windows that this rank encodes, and where their rows go. For attention these are Segments.

    send_rows_S     int64: rows of the tower's output that are sent, in the order of the ranks that they go to
    send_counts     how many go to each rank of the group; Python ints, so that no collective asks the device
    receive_counts  how many come from each
    repeats         whether a row may be sent to several ranks
    """

    send_rows_S: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    group: dist.ProcessGroup
    repeats: bool

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RoutedSegments":
        moved = replace(self, send_rows_S=self.send_rows_S.to(device, non_blocking=non_blocking))
        boundaries = super().to(device, non_blocking)
        moved.__dict__.update(boundaries.__dict__)  # with spans, where they are known
        return moved


def apply_media(model: AVLM) -> None:
    """Exchange rows after each tower, or its resampler, for batches that ``media.split`` has prepared for it."""
    for modality in model.modalities:
        last = modality.projector.resampler or modality.tower
        last.register_forward_hook(_exchange_after)


def _exchange_after(last: nn.Module, inputs: tuple[Media, ...], features_PD: Tensor) -> Tensor:
    segments = inputs[0].segments
    if isinstance(segments, RoutedSegments):
        return exchange(features_PD, segments)
    return features_PD


def exchange(features_PD: Tensor, segments: RoutedSegments) -> Tensor:
    """The rows that arrive here, (A, D), by the rank that they come from. No rows are legal, on any rank."""
    return _Exchange.apply(features_PD, segments)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_PD, segments):
        ctx.segments, ctx.num_rows = segments, features_PD.shape[0]
        sent_SD = features_PD.index_select(0, segments.send_rows_S)
        return swap(sent_SD, segments.send_counts, segments.receive_counts, segments.group)

    @staticmethod
    @once_differentiable
    def backward(ctx, darrived_AD):
        segments = ctx.segments
        dsent_SD = swap(darrived_AD.contiguous(), segments.receive_counts, segments.send_counts, segments.group)
        dfeatures_PD = dsent_SD.new_zeros(ctx.num_rows, dsent_SD.shape[1])
        if segments.repeats:  # on a GPU, where sums of more than two are not in order, only if that is asked for
            return dfeatures_PD.index_add_(0, segments.send_rows_S, dsent_SD), None
        return dfeatures_PD.index_copy_(0, segments.send_rows_S, dsent_SD), None


def swap(sent: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all: what arrives from the ranks of a group, rank after rank. ``send_counts`` cut ``sent`` along its first
    dim."""
    arrived = sent.new_empty(sum(receive_counts), *sent.shape[1:])
    dist.all_to_all_single(arrived, sent, receive_counts, send_counts, group=group)
    return arrived
