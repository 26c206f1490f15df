"""Random configs of adapters that peft can make, on stacked and on separate experts."""

from random import Random

from peft import LoraConfig

from deepseek_latent import DeepseekV2Config, lora_config
from tests.support import V2

MLP = ["gate_proj", "up_proj", "down_proj"]
# `lora_config` reads the layers and the experts per token
MODEL = DeepseekV2Config(**V2 | {"num_experts_per_tok": 1})


def stacked_config(random: Random) -> LoraConfig:
    options = common_options(random)
    names = random.choice([["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]])
    place = random.choice(
        ["{}", "experts.{}", "mlp.experts.{}", "layers.1.mlp.experts.{}", "model.layers.2.mlp.experts.{}"]
    )
    targets = [place.format(name) for name in names]
    if random.random() < 0.2:
        targets = ["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    targets += ["gate.weight"] if random.random() < 0.2 else []
    patterns = [
        "experts.gate_up_proj",
        "mlp.experts.down_proj",
        r"model\.layers\.1\.mlp\.experts\..*",
        ".*gate_up_proj",
    ]
    options |= random_patterns(random, [*patterns, "o_proj", ".*down_proj", ".*"])
    if random.random() < 0.5:
        given = {} if random.random() < 0.5 else {"target_parameters": targets}
        return lora_config(MODEL, routed_experts=True, **options, **given)
    return LoraConfig(**{"target_modules": []} | options, target_parameters=targets)


def separate_config(random: Random) -> LoraConfig:
    options = common_options(random) | {"lora_dropout": random.choice([0.0, 0.05])}
    projections = random.choice([MLP, MLP[:2], MLP[2:]])
    of_experts = rf"\.mlp\.experts\.\d+\.({'|'.join(projections)})"
    layer = random.choice([".*", r"(model\.)?layers\.1", r"(.*\.)?layers\.2"])
    targets = random.choice(
        [
            [*projections, *random.choice([[], ["o_proj"]])],
            [f"experts.{i}.{name}" for i in range(4) for name in projections] + ["shared_experts.down_proj"],
            layer + of_experts,
            rf"({layer}{of_experts})|.*o_proj",
        ]
    )
    if isinstance(targets, str):
        options = {name: x for name, x in options.items() if not name.startswith("layers_")}
    patterns = [r".*\.experts\..*", "layers.1.*", "o_proj", r"experts\.\d+\.(gate_proj|up_proj)", "down_proj", ".*"]
    return LoraConfig(**options | {"target_modules": targets} | random_patterns(random, patterns))


def common_options(random: Random) -> dict:
    options = {
        "r": random.randint(1, 6),
        "lora_alpha": random.choice([1, 7, 16, 5.5, 0.3]),
        "use_rslora": random.random() < 0.3,
        "init_lora_weights": random.choice([True, False, "gaussian"]),
        "bias": random.choice(["none", "none", "all", "lora_only"]),
    }
    extra = {
        "modules_to_save": [["lm_head"], ["norm"], ["embed_tokens", "lm_head"]],
        "trainable_token_indices": [[2, 5]],
        "layers_to_transform": [1, [0, 2], [1, 2]],
        "exclude_modules": [["o_proj"], r".*layers\.0\..*"],
        "target_modules": [["o_proj", "embed_tokens"], MLP, r".*\.self_attn\.(o|q_b)_proj", ["gate_proj", "kv_b_proj"]],
    }
    for name, values in extra.items():
        if random.random() < 0.25:
            options[name] = random.choice(values)
    if "layers_to_transform" in options:
        options |= {
            "target_modules": ["o_proj", *random.choice([[], MLP])],
            "layers_pattern": random.choice([None, "layers"]),
        }
    if "modules_to_save" in options:
        options.pop("trainable_token_indices", None)
    return options


def random_patterns(random: Random, patterns: list[str]) -> dict:
    # peft saves patterns in alphabetical order and takes the first one that matches
    ranks, alphas = (sorted(random.sample(patterns, random.choice([0, 0, 1, 2, 3]))) for _ in range(2))
    return {
        "rank_pattern": {pattern: random.randint(1, 6) for pattern in ranks},
        "alpha_pattern": {pattern: random.choice([1, 3, 2.5, 32]) for pattern in alphas},
    }
