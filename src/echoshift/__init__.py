"""Activity recognition in video under domain shift, bridged by sound."""
