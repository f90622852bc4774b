"""The forms of RETRO: this project's, and those of Megatron-LM, whose checkpoints need them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """What a RETRO model computes where its forms differ.

    Attributes:
        rotary_reading: the encoder and what reads in it, and chunked cross-attention, have rotary positions. Without,
            the encoder has the learned positions of a decoder that has them, else none at all.
        hides_padding: nothing attends to the padding behind a neighbor's tokens.
        normed_residual: what the encoder reads is added to its normalized states, not to the states.
        encoder_norm: a normalization behind the encoder's last layer.
        decoder_norm: one behind the decoder's.
    """

    rotary_reading: bool = True
    hides_padding: bool = True
    normed_residual: bool = False
    encoder_norm: bool = True
    decoder_norm: bool = True


OURS = Form()
_LEGACY = Form(rotary_reading=False, hides_padding=False, encoder_norm=False)
_CORE = dataclasses.replace(_LEGACY, normed_residual=True)
MEGATRON_LM = {"legacy": _LEGACY, "core": _CORE, "core-unnormed": dataclasses.replace(_CORE, decoder_norm=False)}
