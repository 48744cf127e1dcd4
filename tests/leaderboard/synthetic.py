"""A leaderboard that nobody measured: two models, two levels, three methods, four calibrations."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from lm_calib_plugin.leaderboard.tables import (
    AVERAGE,
    COMPRESSED,
    DATA_FREE,
    DENSE,
    NULL,
    POINTS,
    Agreement,
    Analysis,
    Column,
    Comparison,
    Control,
    Entry,
    Heat,
    Kept,
    Ranking,
    Score,
    Share,
    Shares,
)

MODELS = ("SmolLM2-135M", "org/Tiny-Llama")
LEVELS = (("50%", 0.5), ("60%", 0.6))
CALIBRATIONS = ("c4", "code", "c4*0.5+self*0.5", "null:shuffle")
HOSTILE = '<script>alert("x")</script>|`a`=1+1'
COLUMNS = (
    Column("arc_easy", "acc_norm", POINTS, True, 200, 0.25),
    Column("hellaswag", "acc_norm", POINTS, True, 200, 0.25),
    Column("wikitext", "word_perplexity", "perplexity", False, 62),
    Column(AVERAGE, "mean", POINTS, True, None),
)
DENSE_SCORES = {"arc_easy": 54.5, "hellaswag": 43.0, "wikitext": 22.75, AVERAGE: 48.75}
EFFECT = {"wanda": 0.0, "sparsegpt": 1.2, "c4": 0.9, "code": -2.4, "null:shuffle": -4.0}
DRAWS = 5
NOISE = (Control("data-free spread", False, "Draws of magnitude differ."),)


def scores(rng: np.random.Generator, drop: float, draws: int, spread: float) -> dict[str, Score]:
    """Return scores that lie ``drop`` points below the dense model."""
    noise = rng.normal(0, spread, (3, draws)) if spread else np.zeros((3, draws))
    values = {
        "arc_easy": DENSE_SCORES["arc_easy"] - drop + noise[0],
        "hellaswag": DENSE_SCORES["hellaswag"] - 0.7 * drop + noise[1],
        "wikitext": DENSE_SCORES["wikitext"] * np.exp((drop + noise[2]) / 10),
    }
    values[AVERAGE] = (values["arc_easy"] + values["hellaswag"]) / 2
    return {
        task: score(found, 1.6 if task != "wikitext" else 0.4) for task, found in values.items()
    }


def score(values: np.ndarray, item_error: float) -> Score:
    """Return a Score with a normal interval: good enough to be shown."""
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    half = 1.96 * math.hypot((sd or 0) / math.sqrt(len(values)), item_error)
    mean = float(values.mean())
    return Score(tuple(map(float, values)), mean, sd, item_error, mean - half, mean + half)


def kept(found: dict[str, Score]) -> Kept:
    """Return retention by the definition: what is left of the distance from chance."""
    tasks = {
        task: (found[task].mean - 25) / (DENSE_SCORES[task] - 25)
        for task in ("arc_easy", "hellaswag")
    }
    worst = min(tasks, key=lambda task: tasks[task])
    ratios = [found[task].mean / DENSE_SCORES[task] for task in tasks]
    geometric = math.prod(max(share, 0) for share in tasks.values()) ** 0.5
    mean = sum(tasks.values()) / 2
    return Kept(worst, tasks[worst], geometric, mean, sum(ratios) / 2, tasks)


def entry(rng, model, level, method, calibration, role, drop, draws=DRAWS, spread=0.6, **more):
    """Return one row."""
    found = scores(rng, drop, draws, spread)
    strength = dict(LEVELS).get(level)
    arguments = f"pretrained={model},method={method},sparsity={strength},calibration={calibration}"
    return Entry(
        id="/".join((model, level, method, calibration) if role != DENSE else (model, level)),
        model=model,
        level=level,
        method=method,
        calibration=calibration,
        role=role,
        draws=tuple(range(draws)),
        scores=found,
        kept=kept(found),
        strength=strength,
        strength_name="fraction removed" if strength else "",
        sparsity=strength,
        calib_ids=tuple(f"{n:02d}c0ffee" * 4 for n in range(draws))
        if calibration != "none"
        else (),
        calibration_tokens=262144 if calibration != "none" else None,
        keys=tuple(f"{n:02d}fedcba" * 8 for n in range(draws)),
        commands=tuple(
            f"lm_eval --model calib_pruned --model_args '{arguments},calibration_seed={n}'"
            " --tasks arc_easy,hellaswag,wikitext"
            for n in range(draws)
        ),
        dtype="bfloat16",
        revision="0123abcd",
        **more,
    )


def cells(rng: np.random.Generator, model: str) -> list[Entry]:
    """Return all rows of one base model."""
    rows = [entry(rng, model, "dense", "dense", "none", DENSE, 0.0, 1, 0.0)]
    for (level, strength), name in itertools.product(LEVELS, ("sparsegpt", "wanda")):
        for calibration in CALIBRATIONS:
            drop = 40 * (strength - 0.35) - EFFECT[name] - EFFECT.get(calibration, 0.0)
            role = NULL if calibration.startswith("null") else COMPRESSED
            more = {}
            if (name, calibration) == ("wanda", "code"):
                more = {"failed": ("draw 3: CUDA out of memory",), "missing": (4,), "leaked": 0.015}
            rows.append(
                entry(
                    rng, model, level, name, calibration, role, drop, 3 if more else DRAWS, **more
                )
            )
    for level, strength in LEVELS:
        rows.append(
            entry(rng, model, level, "magnitude", "none", DATA_FREE, 70 * (strength - 0.3), 2, 0.0)
        )
    return rows


def comparison(a: Entry, b: Entry, against: str, column: Column) -> Comparison:
    """Return a comparison of independent normal means."""
    first, second = a.scores[column.task], b.scores[column.task]
    delta = first.mean - second.mean
    half = 1.96 * math.hypot(first.sd or 0, second.sd or 0)
    resolved = abs(delta) > half
    chance = float(np.mean([x > y for x in first.draws for y in second.draws]))
    good = (delta > 0) == column.higher_is_better
    word, seen = "better" if good else "worse", f"{delta:+.2f} {column.unit}"
    words = f"a coin flip at 5 draws: {seen}; about 12 more draws needed for the average"
    if resolved:
        words = f"resolved, {word}: {seen}, {word} in 96 % of draw pairs"
    flips = (0.05, 0.09) if column.unit == POINTS and column.task != AVERAGE else (None, None)
    return Comparison(
        a.id,
        b.id,
        against,
        column.task,
        column.unit,
        delta,
        delta - half,
        delta + half,
        *flips,
        0.0004 if resolved else 0.31,
        0.0009 if resolved else 0.62,
        chance,
        f"resolved_{word}" if resolved else "coin_flip",
        words,
        None if resolved else 12,
        len(first.draws) > 1 and 0 < chance < 1,
    )


def comparisons(rows: list[Entry]) -> list[Comparison]:
    """Compare each row with the dense model, with c4, and methods with each other."""
    found = []
    for a in rows:
        for b in rows:
            if a.model != b.model or a.role == DENSE or a is b:
                continue
            if b.role == DENSE:
                against = "dense"
            elif a.level == b.level and a.method == b.method and b.calibration == "c4":
                against = "baseline"
            elif (a.level, a.calibration, a.method) == (b.level, b.calibration, "sparsegpt"):
                against = "method"
            else:
                continue
            found += [comparison(a, b, against, column) for column in COLUMNS]
    return found


def analysis(**changes) -> Analysis:
    """Return the leaderboard, with fields replaced."""
    rng = np.random.default_rng(7)
    rows = [row for model in MODELS for row in cells(rng, model)]
    hostile = entry(rng, MODELS[1], "60%", HOSTILE, "=HYPERLINK(1)", COMPRESSED, 13.0)
    rows.append(dataclasses.replace(hostile, warnings=("<img src=x onerror=alert(1)>",)))
    heats, rankings, shares = [], [], []
    for model, (level, _) in itertools.product(MODELS, LEVELS):
        for method in ("sparsegpt", "wanda"):
            own = [r for r in rows if (r.model, r.level, r.method) == (model, level, method)]
            heats.append(heat(model, level, method, own))
            rankings.append(ranking(model, level, method, own))
        shares += [share(model, level, column.task) for column in COLUMNS]
    tasks = ("arc_easy", "hellaswag", "wikitext")
    taus = ((1.0, 0.33, None), (0.33, 1.0, None), (None, None, None))
    agreements = (
        Agreement(MODELS[1], "60%", "wanda", "tasks", tasks, taus),
        Agreement(MODELS[1], "", "wanda", "levels", ("50%", "60%"), ((1.0, -0.33), (-0.33, 1.0))),
    )
    whole = Analysis(
        name="Source by method, small",
        description="Which calibration source, which method, and how sure are we?",
        columns=COLUMNS,
        entries=tuple(rows),
        comparisons=tuple(comparisons(rows)),
        rankings=tuple(rankings),
        shares=tuple(shares),
        agreements=agreements,
        heats=tuple(heats),
        controls=(
            Control("data-free spread", True, "Draws of magnitude agree to the last bit."),
            Control("repeat", True, "One cell run twice gave the same scores."),
            Control("null calibration", None, "Without meaning, it scores above 0 of 3."),
        ),
        conditions={
            "lm_eval": "0.4.13",
            "tasks": {"arc_easy": 1.0, "hellaswag": 1.0, "wikitext": 2.0},
            "num_fewshot": 0,
            "limit": 200,
            "apply_chat_template": False,
            "tokenizer": "sha256:9d2c...",
        },
        notes=("arc_easy and hellaswag: acc_norm was taken.",),
        failures=((f"{MODELS[0]}/50%/wanda/code draw 3", "CUDA out of memory <b>"),),
        missing=(f"{MODELS[0]}/50%/wanda/code draw 4",),
    )
    return dataclasses.replace(whole, **changes)


def small(**changes) -> Analysis:
    """Return the part of one base model at one level: enough for what takes its time."""
    whole = analysis()

    def own(parts):
        return tuple(p for p in parts if (p.model, p.level) == (MODELS[1], "60%"))

    entries = (*(e for e in whole.entries if e.id == f"{MODELS[1]}/dense"), *own(whole.entries))
    ids = {entry.id for entry in entries}
    kept = dataclasses.replace(
        whole,
        entries=entries,
        comparisons=tuple(pair for pair in whole.comparisons if {pair.a, pair.b} <= ids),
        rankings=own(whole.rankings)[:1],
        shares=own(whole.shares),
        heats=own(whole.heats)[:1],
    )
    return dataclasses.replace(kept, **changes)


def heat(model: str, level: str, method: str, own: list[Entry]) -> Heat:
    """Return retention by calibration and task; one value is missing."""
    tasks = ("arc_easy", "hellaswag")
    values = [[row.kept.tasks[task] for task in tasks] for row in own]
    values[-1][-1] = None
    return Heat(
        model,
        level,
        method,
        "retention",
        tuple(row.calibration for row in own),
        tasks,
        tuple(tuple(line) for line in values),
    )


def ranking(model: str, level: str, method: str, own: list[Entry]) -> Ranking:
    """Return how often each calibration takes each rank, counted over combinations of draws."""
    best = sorted(own, key=lambda row: -row.scores[AVERAGE].mean)
    counts = np.zeros((len(best), len(best)))
    for drawn in itertools.product(*(row.scores[AVERAGE].draws for row in best)):
        for rank, place in enumerate(np.argsort(drawn)[::-1]):
            counts[place, rank] += 1
    counts /= counts.sum(1, keepdims=True)
    ids = tuple(row.id for row in best)
    table = tuple(tuple(map(float, line)) for line in counts)
    return Ranking(model, level, method, AVERAGE, ids, 0.71, table)


def share(model: str, level: str, task: str) -> Shares:
    """Return shares of the variance."""
    parts = {
        "source": Share(0.55, 0.31, 0.72),
        "method": Share(0.14, 0.02, 0.33),
        "interaction": Share(0.0, 0.0, 0.08, clipped=True),
        "draw": Share(0.31, 0.2, 0.5),
    }
    naive = {"source": 0.52, "method": 0.14, "interaction": 0.06, "draw": 0.28}
    return Shares(model, level, task, "ANOVA", parts, naive)
