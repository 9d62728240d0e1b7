"""Compare tables and figures of runs made by hand with numbers worked out by hand."""

import math

import pytest
import torch

from bae.evaluation.figures import reliability
from bae.evaluation.metrics import reliability_table
from bae.report.finished_runs import FinishedRuns
from bae.report.paper_figures import PLOTS
from bae.report.tables import make_table, to_latex, to_markdown

SPEC = {
    "title": "Baselines",
    "paper_model": "Qwen",
    "experiments": ["tables"],
    "command": "bae-train -m experiment=e",
    "reference": "OCB",
    "methods": {"OCB": {"baseline": "ocb"}, "None": {"baseline": "none"}, "RLCR": {"objectives": "rlcr"}},
    "sets": {"MATH500": ["math500", "val"]},
    "published": {"MATH500": {"OCB": {"accuracy": [0.679, 0.0104], "ece": [0.0297]}}},
}


def metrics(accuracy, ece):
    """Return metrics of an evaluation on `val`; every standard error by prompt is a tenth of the value."""
    values = {"accuracy": accuracy, "auroc": 0.75, "ece": ece, "brier": 0.2}
    return {f"eval/val/{name}": value for name, value in values.items()} | {
        f"eval/val/sem_by_prompt/{name}": value / 10 for name, value in values.items()
    }


def completions(correct):
    """Make four prompts with two samples each; `correct` holds the eight verdicts."""
    return [{"prompt": f"val/{i // 2}", "correct": c, "confidence": 0.5} for i, c in enumerate(correct)]


@pytest.fixture(scope="module")
def made(store):
    """Make two seeds of OCB, all right, one seed of no baseline, all wrong, and none of RLCR."""
    size = {"parameters": "450000"}
    curves = {"eval/val/scaling/maj": {1: 0.5, 2: 0.75}, "val/ece": {0: 0.5, 10: 0.25}}
    ocb = {"model": "tiny", "task": "arithmetic", "baseline": "ocb"}
    runs = [
        store.run("tables", ocb | {"seed": 0}, metrics(0.5, 0.1) | curves, tags=size),
        store.run(
            "tables", ocb | {"seed": 1}, metrics(0.7, 0.1) | curves | {"eval/val/scaling/maj": {1: 0.7, 2: 0.85}}
        ),
        store.run("tables", {"model": "tiny", "baseline": "none", "seed": 0}, metrics(0.25, 0.3)),
        store.run("tables", {"model": "tiny", "baseline": "group_mean", "seed": 0}),
    ]
    for run, correct in zip(runs, ([True] * 8, [True] * 8, [False] * 8), strict=False):
        store.table(run, completions(correct), "evaluation/val.parquet")
    return store


def evidence(made, experiments=None):
    return FinishedRuns(made.uri, experiments, None, None, resamples=40)


@pytest.fixture(scope="module")
def table(made):
    return make_table(SPEC, evidence(made))


def test_means_and_standard_errors(table):
    ours = table.values[table.values["source"] == "tiny"].set_index("method")
    assert list(ours.index) == ["OCB", "None"] and list(ours["split"]) == ["val", "val"]
    assert list(ours["runs"]) == [2, 1]
    assert ours["accuracy"]["OCB"] == pytest.approx(0.6)
    assert ours["accuracy_sem"]["OCB"] == pytest.approx(0.1)  # |0.7 - 0.5| / √2, over √2
    assert ours["ece_sem"]["OCB"] == 0
    assert ours["accuracy_sem"]["None"] == pytest.approx(0.025)  # one seed: by prompt


def test_methods_are_tested_against_the_reference(table):
    ours = table.values[table.values["source"] == "tiny"].set_index("method")
    assert ours["accuracy_p"]["None"] == pytest.approx(2 / 41)  # all of 40 resamples are below 0
    assert math.isnan(ours["accuracy_p"]["OCB"])
    assert ours["ece_p"]["None"] == 1  # both are off by one half


def test_published_values_and_what_is_missing(table):
    paper = table.values[table.values["source"] == "paper"].set_index("method")
    assert list(paper.index) == ["OCB", "None", "RLCR"]
    assert paper["accuracy"]["OCB"] == 0.679 and paper["accuracy_sem"]["OCB"] == 0.0104
    assert paper["ece"]["OCB"] == 0.0297 and math.isnan(paper["accuracy"]["None"])
    assert table.missing == ["RLCR on MATH500, tiny: no finished run; bae-train -m experiment=e"]
    assert table.sources == {"paper": "Qwen (paper)", "tiny": "tiny (0.45 M parameters), 2 seeds"}


def test_markdown(table):
    lines = to_markdown(table).splitlines()
    assert lines[0] == "**Baselines** (arXiv 2602.10231)"
    rows = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines if line.startswith("| MATH500")}
    assert rows["OCB"][:6] == ["MATH500", "OCB", "67.90 ± 1.04", "", "0.0297", ""]
    ours = ["arithmetic val", "60.00 ± 10.00", "0.7500 ± 0.0000", "0.1000 ± 0.0000", "0.2000 ± 0.0000"]
    assert rows["OCB"][6:11] == ours  # what was measured is named, and is not the paper's set
    assert rows["None"][7] == "25.00 ± 2.50" and rows["None"][-3:] == ["0.049", "1.000", "1.000"]
    assert lines[-1] == "- missing: RLCR on MATH500, tiny: no finished run; bae-train -m experiment=e"


def test_latex(table):
    lines = to_latex(table).splitlines()
    assert r"\begin{tabular}{llrrrrrrrrrrrr}" in lines
    assert r"\cmidrule(lr){3-6}\cmidrule(lr){7-14}" in lines
    (row,) = (line for line in lines if line.startswith("MATH500 & OCB"))
    assert r"67.90 $\pm$ 1.04 &  & 0.0297 &  & arithmetic val & 60.00 $\pm$ 10.00" in row and row.endswith(r"\\")
    assert all(line.startswith("%") for line in lines[:3]) and lines[2].startswith("% missing: RLCR")


def test_a_table_of_ours_has_its_own_metrics_and_aims(store):
    """Two seeds of OCB reach ECE .10 after 20 and 40 steps of 8 completions; of two of GRPO one does."""
    more = {"eval/val/aurc": 0.4, "eval/val/sem_by_prompt/aurc": 0.04}
    settings = {"model": "tiny", "group_size": 4, "prompts_per_step": 2}
    curves = {"ocb": [{10: 0.2, 20: 0.1, 30: 0.3}, {20: 0.2, 40: 0.05}], "grpo": [{10: 0.1}, {10: 0.11}]}
    for method, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            params = settings | {"method": method, "seed": seed}
            run = store.run("rivals", params, metrics(0.5, 0.1) | more | {"val/ece": curve})
            store.table(run, completions([True, False] * 4), "evaluation/val.parquet")
    spec = SPEC | {
        "experiments": ["rivals"],
        "methods": {"OCB": {"method": "ocb"}, "GRPO": {"method": "grpo"}},
        "sets": {"in distribution": ["val"]},
        "metrics": {"accuracy": "acc", "ece": "ECE", "brier": "Brier", "aurc": "AURC"},
        "aims": {"to_ece": {"label": "ECE ≤ .10 after", "metric": "val/ece", "at_most": 0.1}},
    }
    del spec["published"]
    lines = to_markdown(make_table(spec, evidence(store))).splitlines()
    assert lines[0] == "**Baselines**" and lines[2].startswith("| set | method | data<br>tiny, 2 seeds |")
    ocb, grpo = (line.strip("| ").split(" | ") for line in lines if line.startswith("| in distribution"))
    assert ocb[2:8] == [
        "val", "50.00 ± 0.00", "0.1000 ± 0.0000", "0.2000 ± 0.0000", "0.4000 ± 0.0000", "240 ± 80",
    ]  # fmt: skip
    assert grpo[7] == "1 of 2 seeds" and grpo[8:] == ["1.000"] * 3
    assert "- ECE ≤ .10 after: completions of training until held-out problems reach it" in lines


def test_a_seed_without_auroc_leaves_the_table_whole(store):
    """AUROC has no value where all answers are right, or all wrong."""
    ocb = {"model": "tiny", "task": "arithmetic", "baseline": "ocb"}
    for seed, auroc in enumerate((0.75, math.nan)):
        store.run("half", ocb | {"seed": seed}, metrics(1.0, 0.1) | {"eval/val/auroc": auroc})
    spec = SPEC | {"experiments": ["half"], "methods": {"OCB": {"baseline": "ocb"}}}
    (line,) = (x for x in to_markdown(make_table(spec, evidence(store))).splitlines() if x.startswith("| MATH500"))
    assert "| arithmetic val | 100.00 ± 0.00 | n/a | 0.1000 ± 0.0000 |" in line


def test_what_was_finished_but_not_evaluated_is_named(made):
    spec = SPEC | {"methods": {"OCB": {"baseline": "ocb"}, "Group Mean": {"baseline": "group_mean"}}}
    (line,) = make_table(spec, evidence(made)).missing
    assert line.startswith("Group Mean on MATH500, tiny: finished, but not evaluated on math500 or val: ")
    run_id = line.rpartition("run=")[2].partition(" ")[0]
    assert made.client.get_run(run_id).data.params["baseline"] == "group_mean"


def test_a_table_without_runs(made):
    empty = make_table(SPEC, evidence(made, experiments=["no such experiment"]))
    assert empty.missing == ["no finished runs in no such experiment; bae-train -m experiment=e"]
    assert set(empty.values["source"]) == {"paper"} and "p:" not in to_markdown(empty)


def drawn(made, kind, **more):
    return PLOTS[kind](SPEC | {"method": {"baseline": "ocb"}} | more, evidence(made))


def test_scaling_is_the_mean_over_seeds(made):
    figures, missing = drawn(made, "scaling")
    (line,) = figures["tiny"].axes[0].lines
    assert line.get_ydata() == pytest.approx([0.6, 0.8]) and line.get_label() == "Maj" and missing == []
    none, (missing,) = drawn(made, "scaling", sets={"AIME": ["aime"]})
    assert none == {} and missing.startswith("AIME, tiny: finished, but not evaluated on aime: ")
    assert figures["tiny"].axes[0].get_title() == "tiny, arithmetic val"


def test_reliability_pools_seeds(made):
    figures, _ = drawn(made, "reliability")
    assert sum(bar.get_height() for bar in figures["tiny"].axes[1].patches) == 16


def test_training_curves_name_methods_without_runs(made):
    figures, missing = drawn(
        made, "training", metric="val/ece", label="ECE", methods={"OCB": {"baseline": "ocb"}, "X": {"a": 1}}
    )
    assert figures["tiny"].axes[0].lines[0].get_ydata() == pytest.approx([0.5, 0.25])
    assert missing == ["X: no finished run; bae-train -m experiment=e"]


def test_attempts_that_were_not_logged(made):
    panels = {"first": {"Maj": "val/ece"}, "second": {"Maj": "val/attempt_2/ece"}}
    figures, missing = drawn(made, "attempts", panels=panels)
    assert len(figures["tiny"].axes) == 1 and missing == ["second, tiny: not logged; bae-train -m experiment=e"]


@pytest.mark.parametrize("kind", ["scaling", "reliability", "attempts", "fidelity"])
def test_a_figure_without_runs(made, kind):
    figures, missing = drawn(made, kind, method={"baseline": "no such"}, panels={}, splits=["val"])
    assert figures == {} and missing == ["no finished runs; bae-train -m experiment=e"]


def test_errors_that_were_not_measured(made):
    figures, missing = drawn(made, "fidelity", splits=["val"], group_size=8)
    assert figures == {} and missing == ["tiny: no run that was measured; bae-train -m experiment=e"]


@pytest.mark.filterwarnings("error")
def test_a_reliability_diagram_of_no_confidence_says_so():
    nothing = reliability_table(torch.tensor([float("nan")]), torch.tensor([True]))
    (text,) = reliability({"before": nothing}).axes[0].texts
    assert text.get_text() == "no confidence\nn = 0"
