"""What attention.py prints of its results."""

from attention_analysis.stored import CATEGORIES, OF_TEXT


def text_lines(about: dict) -> list[str]:
    """The mean shares of the texts in the last layer, for each side a line with BOS and, where there is one, a line without.

    about    what attention.json holds
    """
    lines, items = [], about["texts"]
    has_bos = any("bos" in item["shares"] for item in items)
    for side in (side["name"] for side in about["sides"]):
        for name, label in (("shares", side), ("shares_without_bos", "without BOS"))[: 1 + has_bos]:
            means = {c: sum(item[name].get(c, {}).get(side, 0) for item in items) / len(items) for c in CATEGORIES}
            means = {c: mean for c, mean in means.items() if any(c in item[name] for item in items)}
            text = sum(means.get(c, 0) for c in OF_TEXT)
            lines.append(
                f"{label:>11}: " + ", ".join(f"{c} {100 * mean:.1f} %" for c, mean in means.items()) + f"; text {100 * text:.1f} %"
            )
    return lines


def corpus_lines(about: dict) -> list[str]:
    """Shares of base and last side with their difference, in the last layer and in the mean of all, with BOS and without it."""
    sides = list(dict.fromkeys(row["side"] for row in about["shares"]))
    has_bos = any(row["category"] == "bos" and row["mean"] > 0 for row in about["shares"])
    whole = "all tokens" if has_bos else "all tokens, there is no BOS"
    lines = [f"shares of the last token's attention in %; {about['note']}"]
    for layer, where in ((about["layers"], f"last layer ({about['layers']})"), ("all", "mean over layers")):
        for bos in (True, False)[: 1 + has_bos]:
            lines += ["", f"{where}, {whole if bos else 'BOS left out, the rest renormalized'}"]
            lines += block(about, [sides[0], *(sides[-1:] if len(sides) > 1 else [])], layer, bos)
    if len(sides) > 2:
        lines += ["", *curve(about, sides)]
    return lines


def block(about: dict, sides: list[str], layer: int | str, bos: bool) -> list[str]:
    """A table of the categories that have a share."""
    difference = f"{sides[-1]} less {sides[0]}" if len(sides) > 1 else ""
    table = [["", *sides, *([difference] if difference else [])]]
    for category in (*about["categories"], "text"):
        cells = [find(about["shares"], layer, bos, category, side=side) for side in sides]
        if all(cell is None or cell["mean"] == 0 for cell in cells):
            continue
        row = ["text in all" if category == "text" else category, *(interval(cell) for cell in cells)]
        if difference:
            row.append(interval(find(about["differences"], layer, bos, category, side=sides[-1], less=sides[0]), "+"))
        table.append(row)
    return aligned(table)


def curve(about: dict, sides: list[str]) -> list[str]:
    """The share of content words in the last layer, side by side."""
    layer, table = about["layers"], [["content words", *sides]]
    for bos, label in ((True, "all tokens"), (False, "BOS left out")):
        cells = (find(about["shares"], layer, bos, "content", side=side) for side in sides)
        table.append([label, *(f"{100 * cell['mean']:.1f}" for cell in cells)])
    return aligned(table)


def find(rows: list[dict], layer: int | str, bos: bool, category: str, **names: str) -> dict | None:
    wanted = {"layer": layer, "bos": bos, "category": category} | names
    return next((row for row in rows if wanted.items() <= row.items()), None)


def interval(row: dict, sign: str = "") -> str:
    """'12.1 (11.8 to 12.4)', of shares in percent."""
    mean, low, high = (100 * row[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:.1f} to {high:.1f})"


def aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
