"""Planamente et al. as Zhang et al. re-ran it (Table 4): visual features aligned, RNA, predictions summed."""

from __future__ import annotations

from echoshift.train.alignment.methods.rna_grl import RelativeNormAlignmentWithReversal


class PlanamenteRerun(RelativeNormAlignmentWithReversal):
    """The two streams, summed, with a discriminator of visual features, and RNA on both domains.

    Unlike RNA + GRL it leaves audio alone: "an adversarial loss to first align the visual features between domains and
    fuse visual and audio features or predictions afterwards". First is upstream; all terms are trained together [?].
    """

    fusion = ("late",)
    told_apart = ("visual",)
    loss_names = ("class", "domain visual", "RNA source", "RNA target")
