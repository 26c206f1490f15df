"""Checkpoints: checks their files, converts them from and to other layouts, and exports code with them."""
