"""Which routed experts an adapter's config names, with which rank and scaling, and the same said for the other form.

What a config means for the name of a module or parameter is decided by peft's own functions.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..compat.peft_config import value_for
from ..experts.names import PROJECTIONS, STACKED
from .adapter_config import AdapterConfig

_SEPARATE_TARGET = re.compile(r"(.*\.)?experts\.[0-9]+\.(gate|up|down)_proj")


class Setting(NamedTuple):
    """Rank and alpha of A and B."""

    rank: int
    alpha: float


# by the module of a layer's experts, such as model.layers.1.mlp.experts, then by stacked weight
Settings = dict[str, dict[str, Setting]]


class Form(NamedTuple):
    """Routed experts in one of the two forms; `e` is their number in a layer, which matters if they are separate."""

    is_separate: bool
    e: int

    def places(self, experts: str, name: str) -> list[str]:
        """The modules, or the parameter, of a stacked weight."""
        if not self.is_separate:
            return [f"{experts}.{name}"]
        return [f"{experts}.{i}.{projection}" for i in range(self.e) for projection in PROJECTIONS[name]]

    def targeted(self, config: AdapterConfig, experts: str, name: str) -> list[bool]:
        is_target = config.targets_module if self.is_separate else config.targets_parameter
        return [is_target(place) for place in self.places(experts, name)]

    def pattern(self, experts: str, name: str) -> str:
        """A pattern of the places in the layer `experts`, or in all layers if that is empty."""
        if not self.is_separate:
            return re.escape(f"{experts}.{name}") if experts else f"experts.{name}"
        return (re.escape(experts) or r"mlp\.experts") + rf"\.\d+\.({'|'.join(PROJECTIONS[name])})"


def settings_of(config: AdapterConfig, layers: list[str], form: Form) -> Settings:
    """Rank and alpha of what the config names in `layers`.

    Raises ValueError where these differ between matrices that the other form holds in one, or are those of some only.
    """
    settings: Settings = {}
    for experts in layers:
        settings[experts] = {}
        for name in STACKED:
            targeted, places = form.targeted(config, experts, name), form.places(experts, name)
            if not any(targeted):
                continue
            found = {Setting(config.rank(place), config.alpha(place)) for place in places}
            if not all(targeted) or len(found) > 1:
                got = f"{len(found)} of them" if all(targeted) else f"no target {places[targeted.index(False)]}"
                raise ValueError(
                    f"expected one rank and alpha for {' and '.join(PROJECTIONS[name])} of all experts of {experts}, "
                    f"got {got} in the config."
                )
            settings[experts][name] = found.pop()
    return settings


def changed_fields(
    config: AdapterConfig, settings: Settings, ranks: dict[str, dict[str, int]], others: list[str], old: Form, new: Form
) -> dict[str, Any]:
    """The fields of a config that says for the form `new`, with `ranks`, what `config` says for the form `old`.

    `others` are modules and parameters with adapters that are no routed experts; what it says of these stays the same.
    """
    exponent = 0.5 if config.use_rslora else 1
    alphas = {
        experts: {
            name: _rounded(alpha * (ranks[experts][name] / rank) ** exponent) for name, (rank, alpha) in by_name.items()
        }
        for experts, by_name in settings.items()
    }
    changes = _targets(config, settings, others, old, new)
    for field, wanted, default in (("rank_pattern", ranks, config.r), ("alpha_pattern", alphas, config.lora_alpha)):
        patterns = _patterns(config.fields.get(field) or {}, default, wanted, others, old, new)
        if patterns != (config.fields.get(field) or {}):
            changes[field] = patterns
    return changes


def _rounded(alpha: float) -> float:
    """`alpha` without the rounding errors of a factor sqrt(2), and as an integer if it is one."""
    short = round(alpha, 9)
    alpha = short if math.isclose(alpha, short, rel_tol=1e-15) else alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _patterns(
    given: dict[str, Any], default: Any, wanted: dict[str, dict[str, Any]], others: list[str], old: Form, new: Form
) -> dict[str, Any]:
    """Patterns that give experts the values `wanted`, by layer and stacked weight, and `others` those of `given`."""
    experts_before = [place for experts in wanted for name in wanted[experts] for place in old.places(experts, name)]

    def matches(pattern: str, places: Iterable[str]) -> bool:
        return any(value_for(place, {pattern: True}, False) for place in places)

    def with_experts(kept: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name in STACKED:
            values = {experts: by_name[name] for experts, by_name in wanted.items() if name in by_name}
            wrong = [
                experts
                for experts, value in values.items()
                if any(value_for(place, kept, default) != value for place in new.places(experts, name))
            ]
            if wrong and len({*values.values()}) == 1:
                made[new.pattern("", name)] = values[wrong[0]]
            else:
                made |= {new.pattern(experts, name): values[experts] for experts in wrong}
        # peft takes the first pattern that matches
        return made | {pattern: value for pattern, value in kept.items() if pattern not in made}

    kept = {x: value for x, value in given.items() if matches(x, others) or not matches(x, experts_before)}
    patterns = with_experts(kept)
    # peft sorts patterns when it saves them, so what they say must not depend on their order
    in_order = dict(sorted(patterns.items()))
    places = [place for experts in wanted for name in wanted[experts] for place in new.places(experts, name)]
    if all(value_for(place, patterns, default) == value_for(place, in_order, default) for place in [*places, *others]):
        return patterns
    return with_experts({re.escape(module): value_for(module, given, default) for module in others})


def _targets(config: AdapterConfig, settings: Settings, others: list[str], old: Form, new: Form) -> dict[str, Any]:
    """The fields that name modules and parameters, changed where they would not name exactly the experts of `settings`.

    A short way to say it is taken if it means no experts, of these layers and those beside them, that `config` does not
    mean. Else all modules are named one by one.
    """
    modules, parameters = config.fields.get("target_modules"), config.fields.get("target_parameters") or []
    names = [name for name in STACKED if any(name in by_name for by_name in settings.values())]
    every = [x for experts, by_name in settings.items() for name in by_name for x in new.places(experts, name)]
    other_parameters = [target for target in parameters if not _is_stacked_target(target)]
    if new.is_separate:
        common = {"target_parameters": other_parameters or None}
        short = [
            f"experts.{i}.{projection}" for name in names for projection in PROJECTIONS[name] for i in range(new.e)
        ]
        candidates = [{}] if isinstance(modules, str) else [{}, {"target_modules": [*(modules or ()), *short]}]
        one_by_one = sorted(every + [module for module in others if config.targets_module(module)])
        restrictions = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        candidates.append({"target_modules": one_by_one} | restrictions)
    else:
        if isinstance(modules, list):
            modules = [target for target in modules if not _SEPARATE_TARGET.fullmatch(target)]
        common = {"target_modules": modules}
        short = [f"experts.{name}" for name in names]
        candidates = [{"target_parameters": [*targets, *other_parameters]} for targets in (short, every)]
    nearby = _with_neighbors(settings)
    meant = {(experts, name) for experts in nearby for name in STACKED if all(old.targeted(config, experts, name))}

    def fits(candidate: AdapterConfig) -> bool:
        for experts in nearby:
            for name in STACKED:
                targeted = new.targeted(candidate, experts, name)
                is_adapted = name in settings.get(experts, {})
                if not all(targeted) if is_adapted else any(targeted) and (experts, name) not in meant:
                    return False
        return True

    for candidate in candidates:
        if fits(config.with_fields(**common | candidate)):
            return common | candidate
    raise ValueError(
        "expected routed experts that a config can name in the other form, and modules_to_save takes them out: "
        f"{config.fields.get('modules_to_save')!r:.200}."
    )


def _is_stacked_target(target: str) -> bool:
    places = [f".mlp.experts.{name}" for name in STACKED]
    return any(place.endswith(f".{target}") or f".{target}".endswith(place) for place in places)


def _with_neighbors(layers: Iterable[str]) -> list[str]:
    """These layers, the ones before and after each of them, and the first one."""
    numbered = [re.fullmatch(r"(.*layers\.)([0-9]+)(\..*)", experts).groups() for experts in layers]
    near = {(before, int(number) + i, after) for before, number, after in numbered for i in (-1, 0, 1)}
    near |= {(before, 0, after) for before, _, after in numbered}
    return [f"{before}{number}{after}" for before, number, after in sorted(near) if number >= 0]
