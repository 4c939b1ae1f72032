"""What a depth decoder keeps for the backward (``avlm.models.depth``)."""

from avlm.config.codec import CodecConfig
from avlm.config.decoder import DecoderConfig
from avlm.preflight.activations import decoder_block_bytes, rms_norm_bytes
from avlm.preflight.case import Case
from avlm.preflight.layout import Layout


def codes_kept(case: Case) -> int:
    """Bytes for a row of tokens, all of which have codes; 0 in a model without a codec."""
    codec = case.model.codec
    if codec is None:
        return 0
    trains = case.trained_numbers("codec.") > 0
    return case.tokens * codec.num_codebooks * code_bytes(codec, case.model.decoder, case.layout, trains)


def code_bytes(codec: CodecConfig, decoder: DecoderConfig, layout: Layout, trains: bool) -> int:
    """What a depth decoder keeps for each code: its input at the decoder's width, as an embedding and joined with
    others, and at its own; what its blocks and its norm keep; the row of a head. It is never recomputed."""
    of_blocks = codec.num_layers * decoder_block_bytes(codec.depth, None, layout, trains, trains)
    of_norm = rms_norm_bytes(layout, trains) * codec.hidden_size
    return of_blocks + of_norm + layout.dtype.itemsize * (2 * decoder.hidden_size + 2 * codec.hidden_size)
