"""What the numbers allow to say, in plain words. No sentence names a winner where an interval covers 0.

The quality that decides is the task metric where there is one, else the eval loss. The reference is the full-parameter
arm where there is one, else the first arm: how the others compare with it is said first, and what they cost, in shares
of it.
"""

from collections.abc import Iterable, Sequence

from tunesmith.comparison.record import Advice, Arm, ArmSummary, Difference, Forgetting, Verdict

MANY, RAPID, QUALITY, ONE = "many models to serve", "rapid experiments", "maximum quality", "one model"


def decide(
    arms: Sequence[Arm],
    summaries: Sequence[ArmSummary],
    differences: Sequence[Difference],
    forgetting: Sequence[Forgetting] = (),
) -> Verdict | None:
    """The verdict; None before two arms have been compared."""
    labels = {arm.name: arm.label for arm in arms}
    of = {summary.arm: summary for summary in summaries}
    reference = next((arm.name for arm in arms if arm.method == "full"), arms[0].name)
    deciding = sorted(deciding_differences(differences), key=lambda d: reference not in (d.first, d.second))
    if not deciding:
        return None
    sentences = [difference_sentence(d, labels) for d in deciding]
    seen = {(d.measure, d.first, d.second) for d in deciding}
    sentences += [
        difference_sentence(d, labels) for d in differences if (d.measure, d.first, d.second) not in seen
    ]
    for d in deciding:
        sentences += cost_sentences(*_ordered(d, reference), of, labels)
    sentences += forgetting_sentences(forgetting, labels)
    sentences += failed_sentences(summaries, labels)
    main = deciding[0]
    costs = cost_sentences(*_ordered(main, reference), of, labels)
    headline = "; ".join([difference_sentence(main, labels), *costs[:1]])
    return Verdict(headline, tuple(sentences), advise(deciding, of, labels))


def _ordered(d: Difference, reference: str) -> tuple[str, str]:
    """The two arms, the reference first where it is one of them."""
    return (d.second, d.first) if d.second == reference else (d.first, d.second)


def undecided(arms: Sequence[Arm], summaries: Sequence[ArmSummary]) -> Verdict:
    """Of a comparison that has ended without two arms to compare."""
    labels = {arm.name: arm.label for arm in arms}
    trained = {summary.arm for summary in summaries if summary.seeds}
    without = [arm.label for arm in arms if arm.name not in trained]
    why = f"no run of {' and none of '.join(without)} ended well" if without else "no two arms share a seed"
    return Verdict(f"nothing can be compared: {why}", tuple(failed_sentences(summaries, labels)), ())


def failed_sentences(summaries: Sequence[ArmSummary], labels: dict[str, str]) -> list[str]:
    """Runs that are in no mean, and so flatter their arm."""
    return [
        f"{s.failed_runs} of {s.failed_runs + len(s.seeds)} runs of {labels[s.arm]} failed and stand in no number"
        for s in summaries
        if s.failed_runs
    ]


def deciding_differences(differences: Sequence[Difference]) -> list[Difference]:
    """Those of the metric where it was measured, else of the eval loss."""
    metrics = [d for d in differences if not d.lower_is_better]
    return metrics or [d for d in differences if d.measure == "eval_loss"]


def difference_sentence(d: Difference, labels: dict[str, str]) -> str:
    """The difference of two arms with rows, interval and seeds; a better arm only where one is shown."""
    first, second = labels[d.first], labels[d.second]
    runs = f"{d.seeds} seeds each" if d.seeds > 1 else "1 seed each, so other seeds are not covered"
    low, high = d.interval
    over = f"on your {d.rows:,} rows" if d.rows > 1 else "on your one row"
    if d.better is None:
        evidence = f"{_amount(d, d.value)}, interval {_bare(d, low)} to {_bare(d, high)}; {runs}"
        return f"no difference in {_name(d)} shown between {first} and {second} {over} ({evidence})"
    # Both ends have one sign: as magnitudes they are the advantage of the better arm.
    near, far = sorted((abs(low), abs(high)))
    worse = second if d.better == d.first else first
    size = _amount(d, abs(d.value)).lstrip("+")
    bounds = f"interval {_bare(d, near).lstrip('+')} to {_bare(d, far).lstrip('+')}"
    how = "lower" if d.lower_is_better else "higher"
    return f"{labels[d.better]} is better than {worse} {over}: {_name(d)} {size} {how} ({bounds}; {runs})"


def cost_sentences(first: str, second: str, of: dict[str, ArmSummary], labels: dict[str, str]) -> list[str]:
    """What ``second`` took against ``first``: memory and disk in one sentence, time in another."""
    a, b = of.get(first), of.get(second)
    if a is None or b is None:
        return []
    space = []
    if a.peak_memory_bytes and b.peak_memory_bytes:
        space.append(f"{_share(b.peak_memory_bytes / a.peak_memory_bytes)} of the memory")
    if a.checkpoint_bytes and b.checkpoint_bytes:
        space.append(f"{_share(b.checkpoint_bytes / a.checkpoint_bytes)} of the disk")
    found = []
    if space:
        found.append(f"{labels[second]} used {' and '.join(space)} of {labels[first]}")
    if a.training_seconds and b.training_seconds:
        share = _share(b.training_seconds / a.training_seconds)
        found.append(f"{labels[second]} trained in {share} of the time of {labels[first]}")
    return found


def forgetting_sentences(forgetting: Sequence[Forgetting], labels: dict[str, str]) -> list[str]:
    """The change of the loss on general text, arm by arm and text by text."""
    found = []
    for (arm, source), entries in _grouped(forgetting).items():
        changes = [e.general_loss_change for e in entries if e.general_loss_change is not None]
        intervals = [change.interval for change in changes]
        if not changes or any(interval is None for interval in intervals):
            continue
        text = "general text" if source == "shipped" else source
        ends = [interval for interval in intervals if interval is not None]
        if all(low > 0 for low, _ in ends):
            said = f"{labels[arm]} has forgotten something: its loss on {text} rose"
        elif all(high < 0 for _, high in ends):
            said = f"the loss of {labels[arm]} on {text} fell"
        else:
            said = f"no change of the loss of {labels[arm]} on {text} is shown in every run"
        values = ", ".join(f"{change.value:+.3f}" for change in changes)
        bounds = f"intervals from {min(low for low, _ in ends):+.3f} to {max(high for _, high in ends):+.3f}"
        found.append(f"{said} ({values} nats a token, {bounds}, {entries[0].loss_rows} texts)")
    return found


def advise(
    deciding: Sequence[Difference], of: dict[str, ArmSummary], labels: dict[str, str]
) -> tuple[Advice, ...]:
    """Which arm for which use, from the numbers alone.

    An arm that is shown to be worse is never advised for its cheapness without saying so.
    """
    arms = list(dict.fromkeys(name for d in deciding for name in (d.first, d.second)))
    return (
        _cheapest(MANY, arms, of, labels, deciding, "checkpoint_bytes", "its checkpoint is the smallest"),
        _cheapest(RAPID, arms, of, labels, deciding, "training_seconds", "its training took the least time"),
        _best(deciding, labels),
        _one(arms, deciding, of, labels),
    )


def _best(deciding: Sequence[Difference], labels: dict[str, str]) -> Advice:
    arms = list(dict.fromkeys(name for d in deciding for name in (d.first, d.second)))
    beaten = {d.second if d.better == d.first else d.first for d in deciding if d.better is not None}
    winners = [arm for arm in arms if all(_beats(arm, other, deciding) for other in arms if other != arm)]
    if winners:
        return Advice(
            QUALITY, winners[0], f"{labels[winners[0]]} is better than every other arm it was compared with"
        )
    left = [labels[arm] for arm in arms if arm not in beaten]
    if len(left) < 2:
        return Advice(QUALITY, None, "no arm is shown to be better than every other")
    return Advice(
        QUALITY, None, f"no difference is shown between {' and '.join(left)}: more rows or seeds could tell"
    )


def _one(
    arms: Sequence[str], deciding: Sequence[Difference], of: dict[str, ArmSummary], labels: dict[str, str]
) -> Advice:
    best = _best(deciding, labels)
    if best.arm is not None:
        return Advice(ONE, best.arm, f"{labels[best.arm]} is better, and one model is loaded once")
    beaten = {d.second if d.better == d.first else d.first for d in deciding if d.better is not None}
    left = [arm for arm in arms if arm not in beaten]
    if len(left) == 1:
        return Advice(ONE, left[0], f"{labels[left[0]]} alone is not shown to be worse than another")
    return _cheapest(
        ONE,
        left,
        of,
        labels,
        deciding,
        "peak_memory_bytes",
        "no better arm is shown, and it needs the least memory",
    )


def _cheapest(
    use: str,
    arms: Sequence[str],
    of: dict[str, ArmSummary],
    labels: dict[str, str],
    deciding: Sequence[Difference],
    field: str,
    reason: str,
) -> Advice:
    known = {arm: getattr(of[arm], field) for arm in arms if arm in of and getattr(of[arm], field)}
    if len(known) < 2 or len(known) < len(arms):
        return Advice(use, None, "not measured for every arm")
    ranked = sorted(known, key=lambda arm: known[arm])
    share = known[ranked[0]] / known[ranked[-1]]
    if share > 0.95:
        return Advice(use, None, "the arms are within 5 % of each other")
    price = [
        labels[d.better]
        for d in deciding
        if d.better and ranked[0] in (d.first, d.second) and d.better != ranked[0]
    ]
    but = f"; {price[0]} is better, which is the price" if price else ""
    return Advice(use, ranked[0], f"{reason}, {_share(share)} of that of {labels[ranked[-1]]}{but}")


def _beats(arm: str, other: str, deciding: Iterable[Difference]) -> bool:
    return any({d.first, d.second} == {arm, other} and d.better == arm for d in deciding)


def _grouped(forgetting: Sequence[Forgetting]) -> dict[tuple[str, str], list[Forgetting]]:
    groups: dict[tuple[str, str], list[Forgetting]] = {}
    for entry in forgetting:
        groups.setdefault((entry.arm, entry.source), []).append(entry)
    return groups


def _name(d: Difference) -> str:
    return d.measure.replace("_", " ")


def _amount(d: Difference, value: float) -> str:
    return f"{value:+.4f} nats a token" if d.lower_is_better else f"{100 * value:+.1f} points"


def _bare(d: Difference, value: float) -> str:
    return f"{value:+.4f}" if d.lower_is_better else f"{100 * value:+.1f}"


def _share(value: float) -> str:
    """41 %, 1/70, 1.3 times: the form in which a ratio is read most easily."""
    if value >= 1.95:
        return f"{value:.1f} times" if value < 10 else f"{value:.0f} times"
    return f"1/{round(1 / value)}" if value < 0.095 else f"{100 * value:.0f} %"
