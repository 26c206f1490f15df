"""Parts of the configuration: the checks on its fields, and the two forms of RoPE's settings."""
