"""Can the numbers be trusted? What the page says of judges, of engines that must agree, and of experts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from rlhf.report.charts import TONES, Axis, Series, legend, line_chart, number, percent
from rlhf.report.run import RunView, StageView

ROUTERS = {
    "router_entropy": "how evenly experts are chosen, least even layer (1: alike)",
    "router_dead": "experts that no word of a step chose (number)",
}
AGREEMENT = {
    "logprob_gap.p999": "gap, 99.9th percentile",
    "logprob_gap.share_above_1e-4": "share of tokens above 10⁻⁴",
    "logprob_gap.flips": "of these, at a router tie (number)",
    "sync_probe.max": "worst gap on fixed texts after a hand-over",
    "rl.clip_fraction": "share of tokens whose update was clipped",
}


def trust(run: RunView) -> str:
    """The judge, the two engines, the weights on their way, the experts."""
    panels = [*_judge_panel(run), *_engine_panels(run)]
    return f'<div class="figures">{"".join(panels)}</div>' if panels else ""


def _judge_panel(run: RunView) -> list[str]:
    """How good the judge is, on each kind of chains it was measured on."""
    exams = []
    for stage in run.stages:
        scores = [(name, stage.metric(f"judge.{name}")) for name in ("precision", "recall", "kappa")]
        meters = "".join(
            f'<li><span>{name}</span><span class="meter"><i style="width:{100 * min(max(value, 0), 1):.0f}%"></i>'
            f"</span><b>{number(value)}</b></li>"
            for name, value in scores
            if value is not None
        )
        bins = [
            (place, share, right)
            for place in range(10)
            if (share := stage.metric(f"judge.calibration.{place / 10:.1f}.share")) is not None
            and (right := stage.metric(f"judge.calibration.{place / 10:.1f}.accuracy")) is not None
        ]
        if meters:
            on = f" on the rows of <em>{escape(stage.measured_on)}</em>" if stage.measured_on else ""
            off = stage.metric("judge.score_error")
            off_by = f"<p>Its scores of 1 to 5 are off by {number(off)} on average.</p>" if off is not None else ""
            exams.append(
                f'<h4>{escape(stage.name)}{on}</h4><ul class="meters">{meters}</ul>{off_by}{_calibration(bins)}'
            )
    if not exams:
        return []
    return [
        "<figure><figcaption><b>The judge</b></figcaption>"
        "<p>A second model reads what was written beside the picture and says whether it is sound. Precision: of what "
        "it accepts, how much is. Recall: of what is sound, how much it accepts. Kappa: agreement beyond chance.</p>"
        f"{''.join(exams)}</figure>"
    ]


def _calibration(bins: list[tuple[int, float, float]]) -> str:
    """A table of how often a judge is right by how sure it is: (tenth, share of the replies, accuracy) a row."""
    if not bins:
        return ""
    rows = "".join(
        f"<tr><td>{place / 10:.1f} – {(place + 1) / 10:.1f}</td><td>{share:.0%}</td><td>{right:.1%}</td></tr>"
        for place, share, right in bins
    )
    return (
        '<div class="scroll numbers"><table><thead><tr><th>probability of its least likely token</th>'
        f"<th>of replies</th><th>right</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _engine_panels(run: RunView) -> list[str]:
    panels = []
    gaps = _by_stage(run, "logprob_gap.p999")
    finals = _facts(run, AGREEMENT)
    if gaps or finals:
        chart = (
            legend(gaps)
            + line_chart(
                gaps,
                Axis("nats (log scale)", number, log=True),
                summary="Log-probability gap, 99.9th percentile, over steps",
            )
            if gaps
            else ""
        )
        panels.append(
            "<figure><figcaption><b>Do the two engines agree?</b></figcaption><p>One program writes the answers, "
            "another "
            "learns from them. Both compute the probability of every word; the gap between them should stay tiny.</p>"
            f"{chart}{finals}"
            "<p><small>A nat is a factor of 2.7 in probability; 10⁻⁴ of it is a hundredth of a percent. Router tie: "
            "two experts of the mixture score alike, and rounding decides. Clipping keeps one step from moving a "
            "word's probability far.</small></p>"
            "</figure>"
        )
    curves = [(stage.name, stage.curve("sync", "seconds")) for stage in run.stages]
    # a replay hands nothing over, in some microseconds
    handed = [(name, points) for name, points in curves if any(seconds >= 1e-3 for _, seconds in points)]
    syncs = [Series(name, tone, points) for tone, (name, points) in zip(TONES, handed, strict=False)]
    if syncs:
        panels.append(
            "<figure><figcaption><b>Handing over new weights</b></figcaption><p>Before each step the writer gets "
            "the learner's "
            f"weights; this is how long that took.</p>{legend(syncs)}"
            + line_chart(syncs, Axis("seconds", number, 0.0), summary="Seconds of each weight sync over steps")
            + "</figure>"
        )
    routed = _facts(run, ROUTERS)
    if routed:
        panels.append(
            "<figure><figcaption><b>Are all experts used?</b></figcaption><p>The model has several experts a layer, "
            "and sends each word to a few of them. If some were never chosen, they would have learned nothing.</p>"
            f"{routed}"
            "</figure>"
        )
    return panels


def _facts(run: RunView, labels: Mapping[str, str]) -> str:
    """A small table of final measures, a column a stage that has any."""

    def final(stage: StageView, name: str) -> float | None:
        found = (stage.metric(kind + name) for kind in ("", "rl.", "train."))
        return next((value for value in found if value is not None), None)

    stages = [stage for stage in run.stages if any(final(stage, name) is not None for name in labels)]
    if not stages:
        return ""
    rows = []
    for name, label in labels.items():
        values = [final(stage, name) for stage in stages]
        if any(value is not None for value in values):
            shown = _tiny_share if name in ("logprob_gap.share_above_1e-4", "rl.clip_fraction") else number
            cells = "".join(f"<td>{'–' if value is None else shown(value)}</td>" for value in values)
            rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{escape(stage.name)}</th>' for stage in stages)
    return f'<table class="facts"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _tiny_share(value: float) -> str:
    return percent(value) if value >= 0.01 else f"{100 * value:.2g} %"


def _by_stage(run: RunView, name: str) -> list[Series]:
    found = [(stage.name, points) for stage in run.stages if (points := stage.curve(name))]
    return [Series(stage, tone, points) for tone, (stage, points) in zip(TONES, found, strict=False)]
