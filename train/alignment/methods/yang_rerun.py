"""Yang et al. as Zhang et al. re-ran it (Table 4): visual features aligned, then fused with those of audio."""

from __future__ import annotations

from echoshift.train.alignment.methods.grl import GradientReversal


class YangRerun(GradientReversal):
    """The two streams, joined before one classifier (fusion `mid`), with a discriminator of visual features.

    "Directly fuse the features from visual and audio modalities before classification" (Zhang et al., section 2).
    """

    modalities = ("both",)
    fusion = ("mid",)
    told_apart = ("visual",)
    loss_names = ("class", "domain visual")
