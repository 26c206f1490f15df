"""`python -m deepseek_latent`: the command line, for a launcher that starts a module in several processes."""

import sys

from deepseek_latent_command import main

if __name__ == "__main__":
    sys.exit(main())
