"""Caches of compressed latents: in memory, in pages, in files."""
