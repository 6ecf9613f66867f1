"""Whether attention matters for labelled texts: V-measure of every side, and what it costs to hide tokens, for the corpus's shares.json.

Adds to shares.json (`stored.py`), where they were asked for:

    "v_measure"    [V-measure in 0..1 of each of "models"], "ami" the same
    "effects"      what `effects.content_effects` returns: how content words' share goes with V-measure
    "costs"        [{"model", "mask_layers": [first, last] or null, "costs": what `interventions.as_json` returns}] of base and adapters
"""

import numpy as np

from attention_analysis import effects, interventions
from attention_analysis.categories import categorize
from attention_analysis.effects import content_effects, v_measure
from attention_analysis.sides import Side, load_sides


def scores_of_sides(
    sides: list[Side], texts: list[str], labels: list[str], models: list[dict], by_layer: np.ndarray, role: str, settings: dict
) -> dict:
    """V-measure of every side, and how the share of content words goes with it.

    models, by_layer    of `shares.measure_sides`
    settings            of `Encoder.load`
    """
    scores = np.array([v_measure(encoder, texts, labels, role) for _, encoder in load_sides(sides, **settings)])
    effects = content_effects(models, by_layer, scores[:, 0])
    return {"v_measure": scores[:, 0].tolist(), "ami": scores[:, 1].tolist(), "effects": effects}


def costs_of_sides(
    sides: list[Side],
    texts: list[str],
    labels: list[str],
    mask: list[str] | None,
    layers: list[int] | None,
    way: str | None,
    role: str,
    settings: dict,
) -> dict:
    """What hiding the categories `mask` costs base and final adapters; {} where nothing is to be hidden.

    layers    first and last one, from 1; None: all
    way       how content words are told from function words, see `categorize`
    Raises InputError for layers that the model has not, and for a vector that is not the last token's.
    """
    if not mask:
        return {}
    ends, out = [side for side in sides if side.name in ("base", "adapter")], []
    blocks = None if layers is None else range(layers[0] - 1, layers[1])
    for side, encoder in load_sides(ends, **settings):
        categories = categorize(encoder.tokenizer.backend_tokenizer, texts, way)
        names = interventions.names_of_tokens(encoder, texts, categories, role)
        measured = interventions.costs(encoder, texts, labels, names, mask, blocks, role)
        name = side.name if side.run is None else f"{side.run}, {side.name}"
        out.append({"model": name, "mask_layers": layers, "costs": interventions.as_json(measured)})
    return {"costs": out}


def lines_of_worth(about: dict) -> list[str]:
    """What is printed of these. about: shares.json."""
    text = []
    if "v_measure" in about:
        text += ["", "V-measure x 100 of each side"]
        text += [f"  {model['name']}: {100 * score:.1f}" for model, score in zip(about["models"], about["v_measure"], strict=True)]
        text += ["", *effects.lines(about["effects"])]
    if "costs" in about:
        text += ["", "tokens hidden from the last token: V-measure x 100, differences on the same texts with 95 % intervals"]
    for of_model in about.get("costs", []):
        where = "" if of_model["mask_layers"] is None else ", layers {} to {}".format(*of_model["mask_layers"])
        text += ["", *interventions.lines(of_model["model"] + where, interventions.from_json(of_model["costs"]))]
    return text
