"""A result of `edgeguard bench accuracy` as one HTML file: measures, calibration, categories, and the worst errors with their texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeguard.bench import sets
from edgeguard.bench.accuracy_table import model_title, with_interval
from edgeguard.bench.markup import Child, Markup, joined, tag
from edgeguard.bench.page import Shown, document
from edgeguard.bench.published import FIGURES, SOURCE
from edgeguard.bench.reliability import diagram
from edgeguard.bench.report import number
from edgeguard.bench.rows import OWN, SLUGS, Row
from edgeguard.bench.tables import table
from edgeguard.errors import InputError, StoreError

Values = Mapping[str, Any]
CODES = {slug: code for code, slug in SLUGS.items()}
MEASURES = ("", "rows", "unsafe", "F1", "precision", "recall", "FPR", "AUPRC", "AUROC", "ECE", "ECE, raw", "first code right",
            "micro-F1 of codes")
INTERVALS = ("f1", "precision", "recall", "fpr", "auprc", "auroc", "ece", "ece_raw")
KINDS = (("false_alarms", "False alarms", "Safe rows with the highest scores."),
         ("misses", "Misses", "Unsafe rows with the lowest scores."))


def page(result: Values, path: Path, data: Path | None = None) -> Markup:
    """The whole document; raises `InputError` for a result that is not whole, or for `data` that is not the file of the result."""
    try:
        texts = _texts(result["data"], path, data)
        name = f"{result['data']['name']} by {model_title(result['model'])}"
        shown = [
            Shown("measures", "Measures", "In brackets 95% bootstrap intervals. A dash: these rows do not define it.", _measures(result)),
            Shown("published", "Beside published figures", SOURCE, _published(result)),
            Shown("calibration", "Calibration", "Rows by their score: a calibrated score is the share of unsafe rows. The expected "
                  "calibration error is the mean distance from the diagonal, and depends on the share of unsafe rows in the set.",
                  _calibration(result)),
            Shown("categories", "Categories", "Of unsafe rows whose class has a code. A row of several categories counts in each.",
                  _categories(result)),
            Shown("confusion", "Categories and first codes", "Rows by their category, columns by the first code of the answer.",
                  _confusion(result)),
            Shown("sources", "Parts of the set", "At the default threshold.", [_measure_table("By source", result["by_source"])]),
            Shown("errors", "Worst errors", "At the default threshold, to be read by a person.", _errors(result, texts)),
        ]
        title = tag("h1", "What the verdicts are worth")
        top = (title, tag("p", f"{name}, {result['time']}", class_="soft"), _note(texts), _facts(result))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no whole result of this version's edgeguard bench accuracy; repeat the run "
                         f"({type(error).__name__}: {error}).") from error
    return document(name, top, [each for each in shown if each.parts])


def _texts(facts: Values, path: Path, given: Path | None) -> dict[int, Row] | str:
    """The rows by their lines, or why they are not at hand."""
    places = [given] if given else [Path(facts["path"]), path.parent / facts["name"]]
    found = next((place for place in places if place.is_file()), None)
    if found is None and given is None:
        return f"The file {facts['name']} is not at hand, so the texts are not shown. Name it with --data."
    try:
        rows = sets.load(found or places[0], facts["set"])
        if rows.sha256 != facts["sha256"]:
            raise InputError(f"{found} is not the file that was judged (SHA-256 differs).")
    except (InputError, StoreError) as error:
        if given:
            raise
        return f"The texts are not shown: {error}"
    return {row.line: row for row in rows.rows}


def _note(texts: dict[int, Row] | str) -> Markup:
    if isinstance(texts, str):
        return tag("div", tag("b", "Without texts. "), texts, class_="loud", role="note")
    return tag("div", tag("b", "This page holds texts of the set. "), "They are folded below, at the worst errors; they can be harmful or "
               "hateful, and the set's licence may not allow passing them on. The result file holds none.", class_="loud", role="note")


def _facts(result: Values) -> Markup:
    data, model, policy, chosen = result["data"], result["model"], result["policy"], result.get("chosen")
    chosen_set = None if data["set"] == OWN else sets.find(data["set"])
    told: dict[str, Child] = {
        "Set": chosen_set.title if chosen_set else "labelled rows",
        "Label": chosen_set.rule if chosen_set else "as the rows have it",
        "File": f"{data['name']}, SHA-256 {data['sha256'][:16]}",
        "Rows": f"{data['rows']} of {data['of']}" + (f", drawn by seed {data['seed']}" if data["rows"] < data["of"] else ""),
        "Left out": "; ".join(f"{len(lines)}: {reason}" for reason, lines in data["left_out"].items()) or "none",
        "Classes without a code": "; ".join(f"{name} ({count})" for name, count in data["uncoded"].items()) or "none",
        "Model": f"{model_title(model)}, SHA-256 {model['sha256'][:16] or 'not known'}",
        "Prompt profile": model["profile"],
        "Policy": f"{policy['name']}, {len(policy['slugs'])} categories, SHA-256 {policy['sha256'][:16]}",
        "Calibration": _calibration_facts(result["calibration"]),
        "Default threshold": f"{result['threshold']:g}",
        "Threshold chosen elsewhere": _chosen_from(chosen) if chosen else "none",
        "Best F1 on these very rows": _best(result["best_f1"]),
        "Versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        "Machine": f"{result['machine']['cpu'] or result['machine']['arch']}, {result['machine']['system']}",
    }
    return tag("section", tag("dl", [joined(tag("dt", name), tag("dd", value)) for name, value in told.items()]), id="facts")


def _calibration_facts(facts: Values) -> str:
    if not facts["rows"]:
        return "none, the score is the model's own softmax"
    return f"slope {facts['slope']:.4g}, offset {facts['offset']:.4g}, fitted on {facts['rows']} rows, SHA-256 {facts['data_sha256'][:16]}"


def _chosen_from(chosen: Values) -> str:
    source = chosen["from"]
    if isinstance(source, str):
        return f"{chosen['threshold']:g}, {source}"
    return f"{chosen['threshold']:.4g}, the best F1 ({source['f1']:.3f}) on {source['rows']} rows of {source['name']}"


def _best(best: Values | None) -> str:
    if best is None:
        return "none, no row is unsafe"
    return f"{number(best['f1'])} at {best['threshold']:.4g}, chosen on the rows it is told for; it says nothing of others"


def _measures(result: Values) -> list[Markup]:
    return [_measure_table(at, {"all": held["overall"], **held["by_role"]}) for at, held in _thresholds(result)]


def _thresholds(result: Values) -> Iterator[tuple[str, Values]]:
    """What is told at each threshold."""
    yield f"At the default threshold {result['threshold']:g}", result
    if chosen := result.get("chosen"):
        yield f"At {chosen['threshold']:.4g}, chosen elsewhere", chosen


def _tables(result: Values, key: str) -> Iterator[tuple[str, Values]]:
    """What `key` holds at each threshold, for all rows and, where there are several, for each role; with what it is told for."""
    for at, held in _thresholds(result):
        roles = held[key]["by_role"]
        for name, values in {"all rows": held[key]["overall"], **(roles if len(roles) > 1 else {})}.items():
            if values:
                yield f"{at}: {name}", values


def _measure_table(caption: str, groups: Values) -> Markup:
    return table(caption, MEASURES, [[name, *_cells(values)] for name, values in groups.items()])


def _cells(values: Values) -> list[Child]:
    codes = values["codes"]
    right = f"{codes['right']} of {codes['found']}: {with_interval(codes['accuracy'], codes['accuracy_95'])}" if codes["found"] else "-"
    return [
        str(values["rows"]), str(values["unsafe"]),
        *(_one(with_interval(values.get(name), values.get(f"{name}_95"))) for name in INTERVALS),
        _one(right), f"{with_interval(codes['micro_f1'], codes['micro_f1_95'])}; "
        f"of rows found {with_interval(codes['micro_f1_found'], codes['micro_f1_found_95'])}",
    ]


def _one(text: str) -> Markup:
    return tag("span", text, class_="one")


def _published(result: Values) -> list[Markup]:
    """Beside a part of the set it is said that it is one."""
    figures = FIGURES.get(result["data"]["set"], ())
    if not figures:
        return []
    whole = result["data"]["rows"] == result["data"]["of"]
    own = [(f"{result['model']['name']}, threshold {result['threshold']:g}" + ("" if whole else ", a part of the set"), result["overall"])]
    if chosen := result.get("chosen"):
        own.append((f"{result['model']['name']}, threshold {chosen['threshold']:.4g}", chosen["overall"]))
    rows: list[list[Child]] = [
        [name, with_interval(each["f1"], each["f1_95"]), with_interval(each["fpr"], each["fpr_95"]), "this run"] for name, each in own
    ]
    rows += [[figure.guard, number(figure.f1), number(figure.fpr), "published"] for figure in figures]
    return [table("F1 and false positive rate", ("guard", "F1", "FPR", "from"), rows)]


def _calibration(result: Values) -> list[Markup]:
    made: list[Markup] = []
    groups = {"all": result["reliability"]["overall"], **result["reliability"]["by_role"]}
    made.append(tag("div", [diagram(f"reliability-{name}", name, bins) for name, bins in groups.items()], class_="pair"))
    rows = [[f"{each['low']:g} to {each['high']:g}", str(each["rows"]), number(each["score"]), number(each["unsafe"])]
            for each in groups["all"]["score"]]
    made.append(table("All rows", ("score", "rows", "mean score", "share unsafe"), rows))
    return made


def _categories(result: Values) -> list[Markup]:
    return [_category_table(f"Recall by category. {told}", held) for told, held in _tables(result, "categories")]


def _category_table(caption: str, held: Values) -> Markup:
    rows: list[list[Child]] = [
        [f"{code} {each['slug']}", str(each["rows"]), str(each["found"]), _one(with_interval(each["recall"], each["recall_95"])),
         f"{each['right']} of {each['found']}"] for code, each in held.items()
    ]
    return table(caption, ("category", "rows", "found unsafe", "recall", "first code right"), rows)


def _confusion(result: Values) -> list[Markup]:
    return [_confusion_table(f"First codes by category. {told}", held) for told, held in _tables(result, "confusion")]


def _confusion_table(caption: str, held: Values) -> Markup:
    seen = {name for counts in held.values() for name in counts}
    columns = sorted(seen, key=lambda name: (name not in CODES, int(CODES.get(name, "S0")[1:]), name))
    rows: list[list[Child]] = [[_category(own), *(str(counts.get(name) or "") for name in columns)] for own, counts in held.items()]
    return table(caption, ("", *map(_category, columns)), rows)


def _category(slug: str) -> str:
    return f"{CODES[slug]} {slug}" if slug in CODES else slug


def _errors(result: Values, texts: dict[int, Row] | str) -> list[Markup]:
    made: list[Markup] = []
    for kind, title, told in KINDS:
        held = result["worst"][kind]
        rows: list[list[Child]] = [
            [f"line {each['line']}", number(each["score"], 4), number(each["raw_score"], 4), each["role"], each["source"],
             ", ".join(each["codes"]) or "-", ", ".join(map(_category, each["categories"])) or "-", _folded(each["line"], texts)]
            for each in held
        ]
        made.append(tag("h3", title))
        made.append(table(told, ("row", "score", "raw", "role", "source", "codes said", "categories", "text"), rows) if rows
                    else tag("p", "None."))
    return made


def _folded(line: int, texts: dict[int, Row] | str) -> Child:
    if isinstance(texts, str):
        return "-"
    if line not in texts:
        raise InputError(f"The result names line {line}, which the file does not have.")
    messages = texts[line].conversation.messages
    turns: Sequence[Markup] = [tag("div", tag("b", f"{each.role}: "), each.content, class_="text") for each in messages]
    return tag("details", tag("summary", f"{sum(len(each.content) for each in messages)} characters"), turns)
