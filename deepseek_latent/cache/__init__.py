"""What is kept of the past: compressed latents in memory, in pages and in files."""
