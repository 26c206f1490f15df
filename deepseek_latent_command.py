"""The console script `deepseek-latent`, outside of the package, whose import takes seconds and may be interrupted."""

import sys


def main() -> int:
    try:
        from deepseek_latent.commands.__main__ import main as run
    except KeyboardInterrupt:
        print("deepseek-latent: interrupted", file=sys.stderr)
        return 130
    return run()
