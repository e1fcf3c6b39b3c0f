"""Stage 1: training of the audio-adaptive encoder (Zhang et al., section 3.1)."""
