"""Options of `deepseek-latent export-code`."""


def add_command(commands) -> None:
    parser = commands.add_parser("export-code", help="make a checkpoint load where this package is not installed")
    parser.description = (
        "Copies the model's code into a checkpoint folder and names it in its config.json (auto_map), so that the "
        "folder loads with trust_remote_code=True where only transformers is installed."
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--subfolder", default="", metavar="NAME", help="put the code there, not beside the weights")
    parser.set_defaults(action="export_code:write_code")
