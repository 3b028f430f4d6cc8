"""The page: sections in the order a stranger asks. What is this, what happened, how well does it work, can I see it,
can I trust it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlhf.report.charts import TONES, Axis, Series, lanes, legend, line_chart, number, percent, smooth, sparkline
from rlhf.report.run import ENDS, KINDS, RunView, StageView
from rlhf.report.samples import card, followed, gallery, is_right, watch
from rlhf.report.trust import trust
from rlhf.tracking import duration

_STATES = {
    "done": ("✓", "done"),
    "failed": ("✗", "failed"),
    "running": ("◐", "in progress"),
    "stopped": ("■", "stopped"),
    "pending": ("○", "not started"),
}
_PHASES = ("data", "rollout", "reward", "train", "sync", "proof", "checkpoint")
_REST = "exams, sampling and set-up"
_CHOOSES = 0.2  # by how much thinking rates of kinds of questions differ where a model chooses when to think
_MODES = (("think", "thinking first"), ("direct", "answering at once"))
_THEME_SCRIPT = (
    "document.getElementById('theme').onclick=function(){var r=document.documentElement,"
    "d=r.dataset.theme||(matchMedia('(prefers-color-scheme: dark)').matches?'dark':'light');"
    "r.dataset.theme=d==='dark'?'light':'dark'}"
)


def render(run: RunView) -> str:
    """The whole page as one HTML document that loads nothing."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    sections = [
        ("curriculum", "Curriculum", "The curriculum", _curriculum(run)),
        ("accuracy", "Accuracy", "How well it answers", _accuracy(run)),
        ("watch", "Watch", "Watch one question through the stages", _watch(run)),
        ("curves", "Curves", "Learning curves", _curves(run)),
        ("trust", "Trust", "Can the numbers be trusted?", trust(run)),
        ("time", "Time", "Where the time went", _time(run)),
        ("stages", "Gates", "Stages and their gates", _table(run)),
        ("lineage", "Lineage", "Which model came from which", _lineage(run)),
        ("samples", "Samples", "In its own words", _samples(run)),
    ]
    shown = [section for section in sections if section[-1]]
    links = "".join(f'<a href="#{key}">{short}</a>' for key, short, _, _ in shown)
    bodies = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, _, title, body in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{escape(run.name)} · thinkfusion</title>'
        f"<style>{style}</style></head><body>"
        f'<header class="top"><span class="brand">think<b>fusion</b></span><nav aria-label="Sections">{links}</nav>'
        '<button id="theme" type="button" aria-label="Switch between light and dark">◐</button></header>'
        f"<main>{_hero(run)}{bodies}</main>{_footer(run)}<script>{_THEME_SCRIPT}</script></body></html>"
    )


def story(run: RunView) -> list[str]:
    """The run in plain sentences, each only if its numbers are known."""
    done = [stage for stage in run.stages if stage.state == "done"]
    lessons_text = (
        "in a single lesson."
        if len(run.stages) == 1
        else f"{len(run.stages)} lessons in a row, each building on what came before."
    )
    told = [f"This run trains a model that looks at pictures and answers questions about them, {lessons_text}"]
    lessons = [
        f"{_count(sum(stage.kind == kind for stage in run.stages), 'time')} it {what}"
        for kind, what in KINDS.items()
        if any(stage.kind == kind for stage in run.stages)
    ]
    if len(lessons) > 1:
        told.append(f"{_join(lessons)}.".capitalize())
    examined = [stage for stage in run.line if stage.metric("eval.think.accuracy") is not None]
    if len(examined) > 1:
        first, last = examined[0], examined[-1]
        told.append(
            "On held-out questions it never trained on, asked to think out loud first, it was right "
            f"{_accuracy_of(first, 'think')} "
            f"of the time after <em>{escape(first.name)}</em> and {_accuracy_of(last, 'think')} after "
            f"<em>{escape(last.name)}</em>"
            + (
                f"; asked to answer at once, {_accuracy_of(first, 'direct')} and {_accuracy_of(last, 'direct')}."
                if first.metric("eval.direct.accuracy") is not None and last.metric("eval.direct.accuracy") is not None
                else "."
            )
        )
    elif examined:
        told.append(
            f"On held-out questions it never trained on, thinking out loud first, it is right "
            f"{_accuracy_of(examined[0], 'think')} of the time."
        )
    failed = next((stage for stage in run.stages if stage.state == "failed"), None)
    running = next((stage for stage in run.stages if stage.state == "running"), None)
    stopped = next((stage for stage in run.stages if stage.state == "stopped"), None)
    if failed is not None:
        broken = [gate for gate in failed.gates if gate.get("passed") is False]
        why = f": {_gate_text(broken[0])}" if broken else ""
        told.append(f"<strong>It stopped at <em>{escape(failed.name)}</em>{why}.</strong>")
    elif run.ended in ENDS:
        place = f" at <em>{escape(stopped.name)}</em>" if stopped is not None else ""
        why = f": {escape(run.error)}" if run.error else ""
        told.append(
            f"<strong>{ENDS[run.ended]}{place}{why}{'' if why.endswith('.') else '.'}</strong> {len(done)} of "
            f"{len(run.stages)} stages are done; the same command goes on from there."
        )
    elif running is not None:
        finished = f", {len(done)} of {len(run.stages)} stages are done" if len(run.stages) > 1 else ""
        told.append(f"It is now at <em>{escape(running.name)}</em>{finished}.")
    elif run.state == "done" and run.wall_seconds:
        gates = [gate for stage in run.stages for gate in stage.gates]
        passed = f", and passed all {len(gates)} of its quality gates" if gates else ""
        told.append(f"It took {duration(run.wall_seconds)}{passed}.")
    return told


def _hero(run: RunView) -> str:
    icon, word = _STATES[run.state]
    seed = f"seed {run.seed}" if run.seed is not None else ""
    description = f'<p class="description">{escape(run.description)}</p>' if run.description else ""
    best = _best_example(run)
    figure = (
        f"<figure><figcaption>A question it had never seen, after <em>{escape(best[0].name)}</em></figcaption>"
        f"{card(best[1])}</figure>"
        if best
        else ""
    )
    return (
        f'<div class="hero"><div><p class="eyebrow"><span class="pill {run.state}"><b '
        f'aria-hidden="true">{icon}</b> {word}</span>'
        f'<span>{seed}</span></p><h1>{escape(run.name)}</h1>{description}<p class="story">{" ".join(story(run))}</p>'
        f"{_tiles(run)}</div>{figure}</div>"
    )


def _best_example(run: RunView) -> tuple[StageView, dict[str, object]] | None:
    """The latest thinking answer that is right; preferably to the question followed below."""
    for stage in reversed(run.stages):
        followed_keys = [key for key, _ in followed(run.stages)]
        right = [record for record in stage.examples if record.get("think") and is_right(record)]
        right.sort(key=lambda record: str(record.get("key")).partition("#")[0] not in followed_keys[:1])
        if right:
            return stage, dict(right[0])
    return None


def _tiles(run: RunView) -> str:
    tiles = []
    for mode, label in _MODES:
        found = [value for stage in run.line if (value := stage.metric(f"eval.{mode}.accuracy")) is not None]
        if found:
            change = f"from {percent(found[0])}" if len(found) > 1 else "of held-out questions"
            tiles.append((percent(found[-1]), f"right, {label}", change, mode))
    judged = [(stage, v) for stage in run.stages if (v := stage.metric("judge.precision")) is not None]
    if judged:  # the last one: a judge is first measured on made-up chains, then on a policy's own
        stage, precision = judged[-1]
        tiles.append((percent(precision), "judge precision", f"of what it accepts ({escape(stage.name)})", ""))
    ranked = [(stage, v) for stage in run.stages if (v := stage.metric("reward_model.accuracy")) is not None]
    if ranked:  # as of a judge
        stage, accuracy = ranked[-1]
        tiles.append((percent(accuracy), "reward model", f"prefers the better reply ({escape(stage.name)})", ""))
    gates = [gate for stage in run.stages for gate in stage.gates]
    if gates:
        tiles.append((f"{sum(bool(gate.get('passed')) for gate in gates)}/{len(gates)}", "gates passed", "", ""))
    if run.wall_seconds:
        memory = [f"{run.peak_rss_gib:.1f} GiB at most"] if run.peak_rss_gib else []
        planned = [f"{run.budget_minutes:g} min planned"] if run.budget_minutes else []
        tiles.append((duration(run.wall_seconds), "start to end", " · ".join(planned + memory), ""))
    return '<dl class="tiles">' + "".join(
        f'<div class="{tone}"><dd>{value}</dd><dt>{label}</dt><small>{more}</small></div>'
        for value, label, more, tone in tiles
    ) + "</dl>"  # fmt: skip


def _curriculum(run: RunView) -> str:
    total = sum(stage.seconds or 0 for stage in run.stages) or 1.0
    bar = "".join(
        f'<i class="kind-{stage.family} {stage.state}" '
        f'style="flex-grow:{max((stage.seconds or 0) / total, 0.004):.4f}" '
        f'title="{escape(stage.name)}: {_time_of(stage)}"></i>'
        for stage in run.stages
    )
    cards = "".join(
        f'<li class="{stage.state}"><span class="num kind-{stage.family}">{stage.number}</span>'
        f"<b>{escape(stage.name)}</b><span>{KINDS.get(stage.kind, escape(stage.kind))}</span>"
        f'<span class="foot">{_state_mark(stage)}<span>{_time_of(stage)}</span></span></li>'
        for stage in run.stages
    )
    kinds = [kind for kind in KINDS if any(stage.kind == kind for stage in run.stages)]
    legend = "".join(f'<span><i class="kind-{kind}"></i>{kind}: {KINDS[kind]}</span>' for kind in kinds)
    return (
        f'<div class="strip" aria-hidden="true">{bar}</div><div class="legend">{legend}</div><ol '
        f'class="cards">{cards}</ol>'
    )


def _accuracy(run: RunView) -> str:
    examined = [s for s in run.line if any(s.metric(f"eval.{mode}.accuracy") is not None for mode, _ in _MODES)]
    if not examined:
        return ""
    series = []
    for mode, label in _MODES:
        points, band, greedy = [], [], []
        for index, stage in enumerate(examined):
            value = stage.metric(f"eval.{mode}.accuracy")
            low, high = (stage.metric(f"eval.{mode}.accuracy.{end}") for end in ("low", "high"))
            best = stage.metric(f"eval.{mode}.greedy")
            if value is not None:
                points.append((float(index), value))
                if low is not None and high is not None:
                    band.append((float(index), low, high))
            if best is not None:
                greedy.append((float(index), best))
        if points:
            series.append(Series(label, mode, points, band))
        if greedy:
            series.append(Series(f"{label}, greedy", mode, greedy, style="dots"))
    summary = "Share of held-out questions answered right after each stage. " + "; ".join(
        f"{line.label}: " + ", ".join(f"{examined[int(x)].name} {percent(v)}" for x, v in line.points)
        for line in series
        if line.style != "dots"
    )
    axis = Axis("answers that are right", percent, 0.0, 1.0)
    names = [stage.name for stage in examined]
    both = len({line.tone for line in series}) > 1
    ways = " in two ways: with a request to think first, and without" if both else ""
    wide = line_chart(series, axis, summary=summary, x_names=names, size=(900, 340))
    narrow = line_chart(series, axis, summary=summary, x_names=names, size=(380, 340))
    return (
        f"<p>The same held-out questions are asked after a stage{ways}. Each question is asked several times; the "
        "shaded interval is the 95 % confidence, hollow circles are the single most "
        f"likely (greedy) answer.</p>{legend(series)}"
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>{_quality(examined)}'
    )


def _quality(examined: Sequence[StageView]) -> str:
    """What else was measured on the held-out questions, a row a stage; columns that no stage measured are left out."""
    best = sorted({name for stage in examined for name in stage.metrics if name.startswith("eval.think.pass@")})
    columns = {
        "eval.think.accuracy": "right, thinking",
        "eval.think.gain": "change to the stage before",
        "eval.think.greedy": "greedy",
        **{name: f"one of {name.rpartition('@')[2]} right" for name in best},
        "eval.think.format_rate": "in the form asked for",
        "eval.think.soundness": "whole chain sound",
        "eval.think.right_but_unsound": "right, but chain unsound",
        "eval.direct.accuracy": "right, at once",
        "eval.direct.think_rate": "thinks unasked",
        **_apart(examined),
    }
    shown = {name: label for name, label in columns.items() if any(s.metric(name) is not None for s in examined)}
    heads = "".join(f'<th scope="col">{label}</th>' for label in shown.values())
    rows = "".join(
        f'<tr><th scope="row"><i class="kind-{stage.family}"></i>{escape(stage.name)}</th>'
        + "".join(f"<td>{_share(stage, name)}</td>" for name in shown)
        + "</tr>"
        for stage in examined
    )
    sound = (
        " A chain is sound when a program that knows the true picture finds every step of it true; no model has a say "
        "in that."
        if "eval.think.soundness" in shown
        else ""
    )
    return (
        f'<div class="scroll numbers"><table><thead><tr><th>after</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div><p>Shares of the held-out answers; small print: 95 % intervals.{sound}</p>"
    )


def _apart(examined: Sequence[StageView]) -> dict[str, str]:
    """Columns of how often a model thinks, and is right, by kind of question, where it chooses when to think."""
    rate = "eval.think.think_rate."
    kinds = sorted({name.removeprefix(rate) for stage in examined for name in stage.metrics if name.startswith(rate)})
    rates = [[stage.metrics[rate + kind] for kind in kinds if rate + kind in stage.metrics] for stage in examined]
    if not any(max(row) - min(row) > _CHOOSES for row in rates if row):
        return {}
    looks = {rate: "thinks", "eval.think.accuracy.": "right"}
    return {name + kind: f"{label}: {escape(kind)}" for name, label in looks.items() for kind in kinds}


def _share(stage: StageView, name: str) -> str:
    value = stage.metric(name)
    if value is None:
        return '<span class="none">–</span>'
    low, high = (stage.metric(f"{name}.{end}") for end in ("low", "high"))
    change = name.endswith(".gain")
    shown = f"{100 * value:+.1f}" if change else percent(value)
    if low is None or high is None:
        return shown
    sign = "+" if change else ""
    return f"<b>{shown}</b> <small>{100 * low:{sign}.0f} to {100 * high:{sign}.0f}</small>"


def _watch(run: RunView) -> str:
    body = watch(run.stages)
    return (
        "<p>The same picture and question, never used for training, asked again after each stage. Pick "
        "another picture to "
        f"follow that one.</p>{body}"
        if body
        else ""
    )


def _curves(run: RunView) -> str:
    figures = []
    for stage in run.stages:
        names = stage.step_names()
        if not names or stage.kind == "synthesize":  # its steps count prompts: nothing is learned
            continue
        series, axis = _main_curve(stage, names)
        if not series:
            continue
        last = stage.steps[-1]["step"]
        sparks = "".join(
            f"<li><span>{escape(name)}</span>{sparkline(points, 'muted', name)}<b>{number(points[-1][1])}</b></li>"
            for name in names
            if (points := stage.curve(name))
        )
        chart = line_chart(series, axis, summary=f"{axis.label} of stage {stage.name} over {last} steps")
        figures.append(
            f"<figure><figcaption><b>{stage.number}. {escape(stage.name)}</b>"
            f"<span>{_count(int(last), 'step')}</span></figcaption>"
            f"{legend(series)}{chart}<details><summary>{_count(len(names), 'metric')}</summary>"
            f'<ul class="sparks">{sparks}</ul></details></figure>'
        )
    if not figures:
        return ""
    return (
        "<p>Stages that learn from examples push the <em>loss</em> down (how surprised the model is by the "
        "right words); "
        "stages that practise push the <em>reward</em> up. Thin lines are single steps, bold lines their "
        "running mean.</p>"
        f'<div class="figures">{"".join(figures)}</div>'
    )


def _main_curve(stage: StageView, names: Sequence[str]) -> tuple[list[Series], Axis]:
    def first(*wanted: str) -> str | None:
        return next((name for name in wanted if name in names and stage.curve(name)), None)

    reward = first("reward", "reward.mean", "rl.reward", "rl.reward.mean", "reward.value")
    loss = first("loss", "train.loss", "nll", "sft.loss", "rl.loss")
    main = (reward if stage.kind == "rl" else loss) or loss or reward or first(*names)
    if main is None:
        return [], Axis("", number)
    points = stage.curve(main)
    bold = smooth(points)
    if main != reward:
        series = [Series(main, "muted", points, style="faint"), Series(main, "main", bold)]
        held = first("eval.loss", "heldout.loss")
        if held and held != main:
            series.append(Series("held-out loss", "direct", stage.curve(held), style="dots"))
        return series, Axis(main, number, None if min(v for _, v in points) < 0 else 0.0)
    parts = [
        name
        for name in names
        if name.startswith("reward.") and name != main and not name.endswith((".std", ".max", ".min"))
    ]
    series = [Series(main, "muted", points, style="faint")]
    for tone, name in zip(TONES, parts, strict=False):
        series.append(Series(name.removeprefix("reward."), tone, smooth(stage.curve(name)), style="thin"))
    series.append(Series("reward, all parts", "main", bold))
    for mode, label in _MODES:
        if evaluated := stage.curve(f"eval.{mode}.accuracy"):
            series.append(Series(f"held-out, {label}", mode, evaluated, style="dots"))
    return series, Axis("mean reward", number)


def _time(run: RunView) -> str:
    rows, seen = [], dict[str, None]()
    spent = {stage.number: _phases(stage) for stage in run.stages}
    longest = max((sum(phases.values()) for phases in spent.values()), default=0.0)
    if not longest:
        return ""
    for stage in run.stages:
        phases = spent[stage.number]
        if not (total := sum(phases.values())):
            continue
        seen |= dict.fromkeys(phases)
        bars = "".join(
            f'<i class="{_tone_of(name)}" style="flex-grow:{seconds / total:.4f}" '
            f'title="{escape(name)}: {seconds:.1f} s, {percent(seconds / total)}"></i>'
            for name, seconds in phases.items()
        )
        text = ", ".join(f"{name} {percent(seconds / total)}" for name, seconds in phases.items())
        rows.append(
            f'<li><span>{escape(stage.name)}</span><div class="stack" role="img" aria-label="{escape(text)}" '
            f'style="width:{max(100 * total / longest, 1):.1f}%">{bars}</div><b>{duration(total)}</b></li>'
        )
    others = sorted(seen.keys() - {*_PHASES, _REST})
    names = [name for name in (*_PHASES, *others, _REST) if name in seen]
    legend = "".join(f'<span><i class="{_tone_of(name)}"></i>{escape(name)}</span>' for name in names)
    return f'<div class="legend">{legend}</div><ul class="shares">{"".join(rows)}</ul>'


def _phases(stage: StageView) -> dict[str, float]:
    """Seconds of a stage by phase, as its steps tell, and what they do not tell."""
    names = stage.step_names("seconds")
    known = {name: sum(value for _, value in stage.curve(name, "seconds")) for name in names}
    found = {name: known[name] for name in (*_PHASES, *(n for n in names if n not in _PHASES)) if known.get(name)}
    rest = (stage.seconds or 0.0) - sum(found.values())
    return found | ({_REST: rest} if rest > 0.5 else {})


def _tone_of(phase: str) -> str:
    return f"phase-{phase if phase in _PHASES else 'other'}"


def _table(run: RunView) -> str:
    rows = []
    for stage in run.stages:
        gates = "".join(
            f'<li class="{"yes" if gate.get("passed") else "no"}"><b '
            f'aria-hidden="true">{"✓" if gate.get("passed") else "✗"}</b> '
            f"{_gate_text(gate)}</li>"
            for gate in stage.gates
        )
        cells = "".join(f"<td>{_interval(stage, mode)}</td>" for mode, _ in _MODES)
        rows.append(
            f'<tr class="{stage.state}"><td>{stage.number}</td><th scope="row"><i class="kind-{stage.family}"></i>'
            f"{escape(stage.name)}</th><td>{escape(stage.kind)}</td><td>{_state_mark(stage)}</td>"
            f"<td>{_time_of(stage)}</td>"
            f'{cells}<td><ul class="gates">{gates}</ul></td></tr>'
        )
    return (
        "<p>A gate is a bound a stage must meet; if it does not, the run stops there instead of building on it.</p>"
        '<div class="scroll"><table><thead><tr><th></th><th>stage</th><th>kind</th><th>status</th><th>time</th>'
        "<th>right, thinking</th><th>right, at once</th><th>gates</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lineage(run: RunView) -> str:
    made = [stage for stage in run.stages if stage.artifact.get("digest")]
    if len(made) < 2:
        return ""
    rows = {str(stage.artifact["digest"]): index for index, stage in enumerate(made)}
    parents = [rows.get(str(stage.artifact.get("parent"))) for stage in made]
    # a parent can only be an earlier row; anything else would draw a loop
    parents = [parent if parent is not None and parent < index else None for index, parent in enumerate(parents)]
    graph, width = lanes(parents, [f"kind-{stage.family}" for stage in made])
    items = "".join(
        f"<li><b>{escape(stage.name)}</b><code "
        f'title="{escape(str(stage.artifact["digest"]))}">{escape(str(stage.artifact["digest"])[:12])}</code>'
        f"<span>{_parent_text(stage, parent, made)}</span></li>"
        for stage, parent in zip(made, parents, strict=True)
    )
    return (
        "<p>Everything a stage makes is named by a digest of its content, its settings, its data and its "
        "parent. Change a stage, and "
        "only what grew from it is made again.</p>"
        f'<div class="lineage" style="--lanes:{width}px">{graph}<ol>{items}</ol></div>'
    )


def _parent_text(stage: StageView, parent: int | None, made: Sequence[StageView]) -> str:
    if parent is not None:
        return f"from {escape(made[parent].name)}"
    digest = stage.artifact.get("parent")
    return f"from {escape(str(digest)[:12])}" if digest else "from the starting weights"


def _samples(run: RunView) -> str:
    body = gallery(run.stages)
    if not body:
        return ""
    return (
        "<p>What the model wrote, with each part of its reward. A reward that failed or timed out is never "
        "counted as a zero; that "
        f"row is left out of training.</p>{body}"
    )


def _footer(run: RunView) -> str:
    facts = "".join(
        f"<span>{escape(str(key))} <b>{escape(str(value))}</b></span>"
        for key, value in (*run.machine.items(), *run.versions.items())
    )
    return (
        f'<footer><div class="machine">{facts}</div><p>Made by <b>rlhf report</b>. This page is one file and '
        "loads nothing.</p></footer>"
    )


def _state_mark(stage: StageView) -> str:
    icon, word = _STATES[stage.state]
    # the run's own word where it says more than ours
    said = word if stage.word in {"done", "failed", "running", word} else escape(stage.word)
    return f'<span class="state {stage.state}"><b aria-hidden="true">{icon}</b> {said}</span>'


def _time_of(stage: StageView) -> str:
    return duration(stage.seconds) if stage.seconds else "–"


def _interval(stage: StageView, mode: str) -> str:
    value = stage.metric(f"eval.{mode}.accuracy")
    if value is None:
        return '<span class="none">–</span>'
    low, high = (stage.metric(f"eval.{mode}.accuracy.{end}") for end in ("low", "high"))
    around = f" <small>{100 * low:.0f} to {100 * high:.0f}</small>" if low is not None and high is not None else ""
    return f"<b>{percent(value)}</b>{around}"


def _accuracy_of(stage: StageView, mode: str) -> str:
    value = stage.metric(f"eval.{mode}.accuracy")
    return f"<b>{percent(value)}</b>" if value is not None else "an unknown share"


def _gate_text(gate: object) -> str:
    assert isinstance(gate, dict)
    bounds = [f"{sign} {number(gate[end])}" for sign, end in (("≥", "min"), ("≤", "max")) if gate.get(end) is not None]
    value = gate.get("value")
    was = number(value) if isinstance(value, (int, float)) else "not measured"
    return f"{escape(str(gate.get('metric')))} {was}, wanted {' and '.join(bounds)}"


def _count(count: int, word: str) -> str:
    if word == "time":
        return {1: "once", 2: "twice"}.get(count, f"{count} times")
    return f"{count} {word}" + ("" if count == 1 else "s")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
