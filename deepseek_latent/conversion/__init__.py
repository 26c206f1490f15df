"""Checkpoints: what their files must hold, what they amount to, and how the code travels with them."""
