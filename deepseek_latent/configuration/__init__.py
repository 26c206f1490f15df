"""What the configuration checks, and the two spellings of RoPE's settings."""
