"""Round time and the hub's cost per update, beside Flower and NVIDIA FLARE."""
