"""`python -m deepseek_latent.commands`, the command line under its older name."""

import sys

from deepseek_latent_command import main

if __name__ == "__main__":
    sys.exit(main())
