"""Recomputes a cost report from the raw objects of a run, with fractions and without any code of costs/ or core/.

    python tests/recompute.py RUN_FOLDER        prints the figures as JSON

tests/test_costs_recomputed.py compares it with all forms of the report. docs/costs.md and docs/formats.md are its
specification: a ledger on a local disk, no other sources, and spans of ten seconds or more.
"""

import datetime
import itertools
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

SILENT_SECONDS = 180
HEARTBEAT_SECONDS = 3
PREPARATION = {"setup", "init", "compile", "restore"}
ORDER = "provision setup init prep finalize compile restore data_wait train_kept train_lost eval sample api checkpoint"
ORDER = [*ORDER.split(), "idle", "idle_until_down", "not_attributed"]


def events_of(folder: Path) -> list[dict]:
    """The events of a journal. Its objects are named by the numbers of their first and last event."""
    found = {}
    for path in sorted(folder.glob("*-*.jsonl")) if folder.is_dir() else []:
        first = int(path.name.split("-")[0])
        for number, line in enumerate(path.read_text().splitlines(), first):
            try:
                found[number] = json.loads(line)
            except ValueError:
                continue
    return [found[number] for number in sorted(found)]


def read(run: Path) -> list[dict]:
    segments = []
    for folder in sorted((run / "ledger").iterdir()):
        segment = {"number": int(folder.name[-6:]), "spans": [], "steps": [], "restored": None, "end": None, "api": []}
        try:
            start = json.loads((folder / "start.jsonl").read_text())
        except ValueError:
            start = {"machine": {}}
        machine = start["machine"]
        price = machine.get("usd_per_hour")
        usable = isinstance(price, int | float) and not isinstance(price, bool) and price > 0
        usable = usable and machine.get("currency", "USD") == "USD"
        segment |= {"machine": machine, "price": Fraction(price) if usable else None, "start": start.get("time")}
        reached = segment["start"]
        for event in events_of(folder / "events"):
            if event["event"] == "span":
                begin, end = event["start"], event["end"]
                if end < begin:
                    continue
                if reached is not None and begin > reached + 0.001:
                    segment["spans"].append((reached, begin, {}))
                elif segment["spans"] and begin < reached - 0.001:
                    begin = reached
                for step, train, wait in event["steps"]:
                    if not segment["steps"] or step > segment["steps"][-1][0]:
                        segment["steps"].append((step, train, wait))
                if segment["spans"] and end <= begin:
                    continue
                phases = {name: Fraction(seconds) for name, seconds in event["phases"].items()}
                booked, length = sum(phases.values()), Fraction(end) - Fraction(begin)
                if booked > length:
                    phases = {name: seconds * length / booked for name, seconds in phases.items()}
                segment["spans"].append((begin, end, phases))
                reached = end
            elif event["event"] == "mark" and event["name"] == "restored":
                segment["restored"] = event["step"]
            elif event["event"] == "mark" and event["name"] == "api":
                segment["api"].append(event["usd"])
            elif event["event"] == "end":
                segment["end"] = event["reason"]
        if segment["restored"] is None and segment["steps"]:
            segment["restored"] = segment["steps"][0][0] - 1
        segments.append(segment)
    return segments


def day_of(time: float) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.UTC).date().isoformat()


def share(segment: dict, begin: float, end: float, segments: list[dict]) -> Fraction:
    """Which part of an interval a segment pays, if others ran on its host then."""
    host = segment["machine"].get("host")
    others = [s for s in segments if host and s["spans"] and s["machine"].get("host") == host]
    edges = sorted({begin, end, *(x for s in others for x in (s["spans"][0][0], s["spans"][-1][1]) if begin < x < end)})
    paid = Fraction(0)
    for low, high in itertools.pairwise(edges):
        users = sum(s["spans"][0][0] <= low and high <= s["spans"][-1][1] for s in others)
        paid += (Fraction(high) - Fraction(low)) / max(1, users)
    return paid / (Fraction(end) - Fraction(begin)) if end > begin else Fraction(1)


def cells_of(run: Path, segments: list[dict], now: float) -> list[dict]:
    found, boundary, boundaries = [], math.inf, {}
    for segment in reversed(segments):
        boundaries[segment["number"]] = boundary
        if segment["restored"] is not None:
            boundary = min(boundary, segment["restored"])
    known_api = 0.0
    for segment in segments:
        machine, price = segment["machine"], segment["price"]
        market = {True: "spot", False: "on demand"}.get(machine.get("spot"), "?")
        facts = {"segment": str(segment["number"]), "market": market}
        for name, key in (("cloud", "cloud"), ("region", "region"), ("zone", "zone"), ("instance", "instance_type")):
            facts[name] = machine.get(key) or "?"

        def add(phase, day, seconds, usd, more=Fraction(0), facts=facts):
            found.append({"phase": phase, "day": day, "seconds": seconds, "usd": usd, "more": more, **facts})

        last = boundaries[segment["number"]]
        again = [step for step in segment["steps"] if step[0] > last]
        left = {"train": sum(Fraction(s[1]) for s in again), "data_wait": sum(Fraction(s[2]) for s in again)}
        ended = segment["spans"][-1][1] if segment["spans"] else segment["start"]
        live = segment["end"] is None and ended is not None and abs(now - ended) < SILENT_SECONDS
        if segment["end"] != "finished" and not (live and segment is segments[-1]):
            for place, phase in ((1, "train"), (2, "data_wait")):
                spent = sum(phases.get(phase, Fraction(0)) for _, _, phases in segment["spans"])
                left[phase] += max(Fraction(0), spent - sum(Fraction(step[place]) for step in segment["steps"]))
        segment["lost_steps"] = len(again)
        segment["paid_seconds"] = Fraction(0)
        for begin, end, phases in reversed(segment["spans"]):
            part = share(segment, begin, end, segments)
            split = {"not_attributed": max(Fraction(0), Fraction(end) - Fraction(begin) - sum(phases.values()))}
            for phase, seconds in phases.items():
                lost = min(seconds, left.get(phase, Fraction(0)))
                if lost:
                    left[phase] -= lost
                    split["train_lost"] = split.get("train_lost", Fraction(0)) + lost
                name = "train_kept" if phase == "train" else phase
                split[name] = split.get(name, Fraction(0)) + seconds - lost
            for phase, seconds in split.items():
                segment["paid_seconds"] += seconds * part
                if seconds or price is None:
                    add(phase, day_of(begin), seconds * part, price and seconds * part * price / 3600)
        if not segment["spans"]:
            add("not_attributed", "?" if segment["start"] is None else day_of(segment["start"]), Fraction(0), None)
        if price and not live and not (segment["end"] and segment["spans"]):
            more = HEARTBEAT_SECONDS * price / 3600
            add("not_attributed", day_of(ended), Fraction(0), Fraction(0), more)
        for usd in segment["api"]:
            if usd > known_api:
                add("api", day_of(ended), Fraction(0), Fraction(usd) - Fraction(known_api))
                known_api = usd
    return found


def rounded(amounts: list[Fraction | None], places: int, total: Fraction) -> list[Fraction | None]:
    """Cents that add up to `total` in cents: each amount's floor, and one cent more for the largest remainders."""
    unit = Fraction(1, 10**places)
    floors = [None if amount is None else math.floor(amount / unit) for amount in amounts]
    rest = round(total / unit) - sum(floor for floor in floors if floor is not None)
    order = sorted((i for i, f in enumerate(floors) if f is not None), key=lambda i: floors[i] - amounts[i] / unit)
    for index in order[: max(0, rest)]:
        floors[index] += 1
    return [None if floor is None else floor * unit for floor in floors]


def recompute(run: Path, now: float) -> dict:
    """Total, phases, segments and groups, each line as (seconds, least dollars, most dollars, is known)."""
    segments = read(run)
    cells = cells_of(run, segments, now)
    usd = sum(cell["usd"] for cell in cells if cell["usd"] is not None)
    places = 2 if usd >= 1 else 4 if usd >= Fraction(1, 100) or usd <= 0 else 6
    unit = Fraction(1, 10**places)
    more = sum(cell["more"] for cell in cells)
    any_price = any(cell["usd"] is not None for cell in cells)
    total = (round(usd / unit) * unit, round(more / unit) * unit)

    def lines(key: str, names: list[str]) -> dict:
        own = {name: [cell for cell in cells if cell[key] == name] for name in names}
        sums, extra = [], []
        for parts in own.values():
            priced = [cell["usd"] for cell in parts if cell["usd"] is not None]
            sums.append(sum(priced, Fraction(0)) if priced or (any_price and not parts) else None)
            extra.append(sum((cell["more"] for cell in parts), Fraction(0)))
        least, above = rounded(sums, places, total[0]), rounded(extra, places, total[1])
        return {
            name: {
                "seconds": float(sum(cell["seconds"] for cell in parts)),
                "usd": None if low is None else float(low),
                "usd_most": None if low is None else float(low + high),
                "complete": all(cell["usd"] is not None for cell in parts),
                "exact": float(sum(cell["usd"] or 0 for cell in parts)),
            }
            for (name, parts), low, high in zip(own.items(), least, above, strict=True)
        }

    used = {cell["phase"] for cell in cells}
    shown = used | {"not_attributed"} | ({"train_lost"} if "train_kept" in used else set())
    phases = lines("phase", [name for name in ORDER if name in shown] + sorted(shown - set(ORDER)))
    whole = all(cell["usd"] is not None for cell in cells)
    groups = ("day", "cloud", "region", "zone", "instance", "market")
    seconds = sum(cell["seconds"] for cell in cells)
    return {
        "places": places,
        "total": {
            "seconds": float(seconds),
            "usd": float(total[0]) if any_price else None,
            "usd_most": float(sum(total)) if any_price else None,
            "complete": whole,
        },
        "phases": phases,
        "segments": lines("segment", [str(segment["number"]) for segment in segments]),
        "by": {group: lines(group, sorted({cell[group] for cell in cells})) for group in groups},
        "steps_lost": [segment["lost_steps"] for segment in segments],
        "units": units(run, segments, cells, usd if whole else None, seconds),
    }


def units(run: Path, segments: list[dict], cells: list[dict], usd: Fraction | None, seconds: Fraction) -> dict:
    """The unit costs that follow from dollars, time and tokens; tokens of the newest step that counts."""
    tokens, boundary, best = None, math.inf, (-1, None)
    for segment in reversed(segments):
        for record in events_of(run / "metrics" / f"segment-{segment['number']:06d}"):
            if record["kind"] == "train" and record["step"] <= boundary and record["step"] > best[0]:
                best = (record["step"], record["tokens"])
        if segment["restored"] is not None:
            boundary = min(boundary, segment["restored"])
    tokens = best[1]
    kept = sum(cell["seconds"] for cell in cells if cell["phase"] == "train_kept")
    gpus = [s["machine"].get("gpus_per_node", 0) * s["machine"].get("nodes", 1) for s in segments]
    hours = (
        sum(s["paid_seconds"] * count for s, count in zip(segments, gpus, strict=True)) / 3600 if all(gpus) else None
    )
    restarts, again = len(segments) - 1, Fraction(0)
    for cell in cells:
        if cell["phase"] == "train_lost" or (cell["phase"] in PREPARATION and cell["segment"] != "1"):
            again += cell["usd"] or 0
    priced = all(segment["price"] for segment in segments)
    return {
        "tokens": tokens,
        "usd_per_billion_tokens": float(usd / Fraction(tokens) * 10**9) if usd is not None and tokens else None,
        "gpu_hours": None if hours is None else float(hours),
        "usd_per_gpu_hour": float(usd / hours) if usd is not None and hours else None,
        "goodput": float(kept / seconds) if kept and seconds else None,
        "tokens_per_second": float(Fraction(tokens) / kept) if tokens and kept else None,
        "restarts": restarts,
        "usd_per_restart": float(again / restarts) if restarts and priced else None,
    }


if __name__ == "__main__":
    print(json.dumps(recompute(Path(sys.argv[1]), datetime.datetime.now(datetime.UTC).timestamp()), indent=1))
