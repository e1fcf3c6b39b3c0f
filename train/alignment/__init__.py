"""Aligns modalities or domains on cached features: Planamente et al. 2021, its companions and competitors."""
