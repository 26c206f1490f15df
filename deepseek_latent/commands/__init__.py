"""The command `deepseek-latent`."""
