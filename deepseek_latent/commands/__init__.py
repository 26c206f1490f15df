"""What the command `deepseek-latent` does. Its options are in the package `deepseek_latent_command`."""
