"""Segments: boundaries on the device, spans on the host."""

import pytest
import torch

from kernels.segments import Segments


def test_lengths_become_boundaries_with_empty_segments_kept():
    segments = Segments.of([3, 0, 5])
    assert segments.cu_seqlens.tolist() == [0, 3, 3, 8] and segments.cu_seqlens.dtype == torch.int32
    assert (len(segments), segments.max_length) == (3, 5)
    assert segments.spans == [(0, 3), (3, 0), (3, 5)]


def test_no_segments_are_legal():
    segments = Segments.of([])
    assert (len(segments), segments.max_length, segments.spans) == (0, 0, [])


def test_slots_tell_what_is_used_of_them():
    segments = Segments(torch.tensor([0, 4, 8], dtype=torch.int32), 4, torch.tensor([1, 3], dtype=torch.int32))
    assert segments.spans == [(0, 1), (4, 3)]
    moved = segments.to("cpu")
    assert moved.spans == segments.spans and moved.lengths.tolist() == [1, 3]


def test_equal_boundaries_are_still_different_keys():
    a, b = Segments.of([2, 2]), Segments.of([2, 2])
    assert a != b and len({a, b}) == 2


def test_a_segment_longer_than_max_length_is_refused():
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    Segments(cu_seqlens, 5).check(7)
    with pytest.raises(ValueError, match="a segment has 5 rows, more than max_length=4"):
        Segments(cu_seqlens, 4).check(7)


def test_segments_for_a_device_know_their_rows_without_asking_it():
    segments = Segments.of([2, 0, 3], "meta")  # a device that cannot be read
    assert segments.num_rows == 5 and segments.spans == [(0, 2), (2, 0), (2, 3)]
