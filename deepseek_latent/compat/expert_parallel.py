"""How a package decides how experts get their tokens in transformers 5.23 and 5.24; older versions do not let it."""

try:
    from transformers.distributed.expert_parallel import AllReduceEP, EPImplementation, EPImplementationInterface
except ImportError:
    AllReduceEP, EPImplementation, EPImplementationInterface = None, object, None


def register_implementation(name: str, implementation: type) -> None:
    """Lets `DistributedConfig(ep_implementation=name)` choose this implementation, where there is a choice."""
    if EPImplementationInterface is not None:
        EPImplementationInterface.register(name, implementation)
