"""Options of `deepseek-latent inspect`."""


def add_command(commands) -> None:
    parser = commands.add_parser("inspect", help="count parameters and cache, check a checkpoint's files")
    parser.description = (
        "Counts parameters and cache without loading weights. For a folder, also compares every tensor's name, shape "
        "and dtype with config.json, from the files' headers. Exit code 0: the files fit, 1: they do not, 2: unusable "
        "input."
    )
    parser.add_argument("model", metavar="MODEL_OR_CONFIG", help="a folder, a config.json or a hub id")
    parser.add_argument("--all", action="store_true", help="list all problems, not only the first ones")
    parser.set_defaults(action="inspect:inspect_checkpoint")
