"""Studies of residual networks, one file each, that run fused and eager side by side."""
