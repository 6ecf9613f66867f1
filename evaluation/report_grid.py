"""The heat map of a report: the settings of untuned bases, prompts and layers down, poolings and scopes across."""

import json
from collections import Counter
from typing import NamedTuple

import numpy as np

from encoder.contract import POOLING_PRESETS, SCOPES
from files.page import plain
from prompts import each_prompt, prompt_label

Row = tuple[str, str]  # label and fingerprint
PLACED = {"base", "revision", "prompts", "pooling", "scope", "layers", "eos", "keep_bos"}  # fields that have their place in a heat map


def of_rows(cells: list[dict]) -> dict[Row, dict[str, dict]]:
    """Cells by row and task."""
    rows = {}
    for cell in cells:
        rows.setdefault((cell["model"], cell["fingerprint"]), {})[cell["task"]] = cell
    return rows


def mean_score(by_task: dict[str, dict], tasks: list[str]) -> float | None:
    """The table's mean over its tasks; None where one is missing."""
    return float(np.mean([by_task[task]["score"] for task in tasks])) if set(tasks) <= set(by_task) else None


def pooling_name(contract: dict) -> str:
    """How people call the pooling: the name of the preset whose fields these are, else that of the pooling."""
    for name, fields in POOLING_PRESETS.items():
        if all(contract.get(field) == (list(value) if isinstance(value, tuple) else value) for field, value in fields.items()):
            return name
    return contract["pooling"]


class Setting(NamedTuple):
    """Where an untuned base's setting stands in the heat map."""

    base: str
    prompt: str
    layers: str
    pooling: str
    scope: str
    bare: bool  # nothing stands around the text: both scopes are the same tokens


def setting(contract: dict, varying: list[str]) -> Setting:
    """`varying` are further fields of the contract, which are named beside the pooling."""
    name, prompts = pooling_name(contract), contract["prompts"]
    layers = "its own layers" if "layers" in POOLING_PRESETS.get(name, {}) else "layer " + " ".join(map(str, contract["layers"]))
    pooling = ", ".join([name, *(f"{field} {contract[field]}" for field in varying if contract.get(field))])
    bare = not any(affix for role in prompts.values() for prompt in each_prompt(role) for affix in prompt.values())
    return Setting(contract["base"], prompt_label(prompts), layers, pooling, contract["scope"], bare)


def settings_of(rows: dict[Row, dict[str, dict]]) -> dict[Row, Setting]:
    """The settings of untuned bases that have more than two."""
    contracts = {row: next(iter(by_task.values()))["contract"] for row, by_task in rows.items()}
    contracts = {row: contract for row, contract in contracts.items() if contract and not contract.get("data")}  # runs know their pairs
    per_base = Counter(contract["base"] for contract in contracts.values())
    contracts = {row: contract for row, contract in contracts.items() if per_base[contract["base"]] > 2}
    fields = {field for contract in contracts.values() for field in contract} - PLACED
    varying = sorted(f for f in fields if len({json.dumps(contract.get(f)) for contract in contracts.values()}) > 1)
    return {row: setting(contract, varying) for row, contract in contracts.items()}


def places(settings: dict[Row, Setting]) -> dict[tuple[str, str], Row]:
    """The row behind each cell of the heat map: down the prompt and what else varies, across pooling and scope.

    A prompt with nothing around the text stands under every scope that its pooling has with the others.
    """
    with_prompt = {(s.pooling, s.scope) for s in settings.values() if not s.bare}
    varied = [name for name in ("base", "prompt", "layers") if name == "prompt" or len({getattr(s, name) for s in settings.values()}) > 1]
    many = len({scope for _, scope in with_prompt}) > 1
    at = {}
    for row, s in settings.items():
        scopes = [scope for scope in SCOPES if (s.pooling, scope) in with_prompt] if s.bare else [s.scope]
        for scope in scopes or [s.scope]:
            at[", ".join(getattr(s, name) for name in varied), s.pooling + f", {scope}" * many] = row
    return at


def heat_map(cells: list[dict]) -> dict | None:
    """What report.js draws of grids, by the mean over tasks and by each of them; None where no untuned base has more than two settings."""
    rows = of_rows(cells)
    at = places(settings_of(rows))
    if not at:
        return None
    tasks, down, across = (list(dict.fromkeys(names)) for names in ([cell["task"] for cell in cells], *zip(*at, strict=True)))
    views = {"mean": tasks} if len(tasks) > 1 else {}
    values, shown = {}, {}
    for name, of in (views | {task: [task] for task in tasks}).items():
        scores = [[mean_score(rows[at[d, a]], of) if (d, a) in at else None for a in across] for d in down]
        values[plain(name, 60)] = [[None if missing(score) else 100 * score for score in line] for line in scores]
        shown[plain(name, 60)] = [["" if missing(score) else f"{100 * score:.1f}" for score in line] for line in scores]
    metrics = ", ".join(dict.fromkeys(cell["metric"].replace("_", "-") for cell in cells))
    return {"rows": unlike(down), "columns": unlike(across), "values": values, "shown": shown, "metric": metrics}


def missing(score: float | None) -> bool:
    """Also where a metric is not defined, as a correlation with what never changes."""
    return score is None or bool(np.isnan(score))


def unlike(names: list[str]) -> list[str]:
    """Names that fit beside a picture; where two long ones begin alike, their number tells them apart."""
    short = [plain(name, 60) for name in names]
    return [f"{name} ({i + 1})" if short.count(name) > 1 else name for i, name in enumerate(short)]
