"""How transformers (5.17 to 5.24) finds these classes by their names, and by configs made before this import."""

import functools
import os
import sys
from importlib import import_module
from types import ModuleType

from torch import nn
from transformers.configuration_utils import PreTrainedConfig


def put_into_transformers(*classes: type) -> None:
    """Sets these classes as attributes of `transformers`, where code looks up the names in `config.architectures`.

    TRL's trainers do so for a model id and for their reference models, and so do pipelines and `transformers serve`;
    Auto classes have a registry of their own. The submodules of transformers stay as they are.

    transformers replaces its own module by a second one when it imports its processors (5.17 to 5.24), and modules that
    imported the first one keep it. So both get the classes.
    """
    imported = [vars(x).get("transformers") for x in [*sys.modules.values()] if isinstance(x, ModuleType)]
    for module in {id(x): x for x in (*imported, sys.modules["transformers"])}.values():
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            for each in classes:
                setattr(module, each.__name__, each)


def take_native_configs(native: type, by_auto_class: dict[type, type]) -> None:
    """Has Auto classes take a config of transformers' own class, made before this import, for one of these models.

    `register` of some versions ignores configs of transformers' own classes, so the table behind it is filled directly.
    """
    for auto_class, model_class in by_auto_class.items():
        auto_class._model_mapping._extra_content[native] = model_class


def backbone_of_native_config(backbone: type) -> type:
    """What AutoModel takes for a config of transformers' own class, which was made before this package was imported.

    `from_pretrained` gives `backbone`. The heads of transformers' own class make their backbone by `from_config`
    (5.17 to 5.24), so `from_config` gives transformers' own.
    """

    class NativeConfigBackbone:
        config_class = backbone.config_class
        from_pretrained = backbone.from_pretrained

        @classmethod
        def _from_config(cls, config: PreTrainedConfig, **kwargs) -> nn.Module:
            own = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
            return getattr(own, backbone.__name__)._from_config(config, **kwargs)

    return NativeConfigBackbone


def patch_base_config_reader(own: type[PreTrainedConfig]) -> None:
    """Has `PreTrainedConfig.from_json_file` read a file of these models as their class `own`.

    Trainer calls it on the base class when it resumes (5.17 to 5.24). That class has no `max_position_embeddings`, and
    so raises AttributeError if a file has both `rope_theta` and a `rope_scaling` of the type yarn, longrope or llama3,
    as DeepSeek's own files do. transformers saves neither of the two for its own models.
    TODO: drop it when PreTrainedConfig reads DeepSeek-V2's published config.json.
    """
    read = PreTrainedConfig.from_json_file.__func__
    if hasattr(read, "reads_own"):
        return

    @functools.wraps(read)
    def read_as_own(cls, json_file: str | os.PathLike) -> PreTrainedConfig:
        is_own = cls is PreTrainedConfig and cls._dict_from_json_file(json_file).get("model_type") == own.model_type
        return read(own if is_own else cls, json_file)

    read_as_own.reads_own = True
    PreTrainedConfig.from_json_file = classmethod(read_as_own)
