"""bae-evaluate and bae-report as a user meets them, on a policy of the tiny kind and on files."""

import json
import math
from pathlib import Path

import pandas
import pytest
import torch

from bae.commands import evaluate, report, train
from bae.evaluation.measure import lines, summarise
from bae.text.verifier import IntegerVerifier
from tests.support import call, runs

TINY = [
    "steps=1", "group_size=2", "prompts_per_step=2", "callbacks.held_out.prompts=4", "callbacks.held_out.every=0",
    "callbacks.completions.rows=1", "callbacks.evaluation.splits=[val,easy]", "callbacks.evaluation.prompts=6",
    "callbacks.evaluation.samples=4", "logger.experiment=table1", "callbacks.checkpoints.log_policy=false",
    "callbacks.throughput.seconds=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two methods, two seeds of one, trained for a step."""
    folder = tmp_path_factory.mktemp("runs") / "outputs"
    for more in (["method=ocb", "seed=0"], ["method=ocb", "seed=1"], ["method=none", "seed=0"]):
        call(train, folder, *TINY, *more)
    return folder


def table(answers, verdicts, confidences, prompts):
    return pandas.DataFrame({"prompt": prompts, "answer": answers, "verdict": verdicts, "confidence": confidences,
                             "correct": [v == "correct" for v in verdicts]})  # fmt: skip


def test_abstentions_are_a_share_and_not_attempted():
    made = table(
        ["5", "no", "6", "no"], ["correct", "abstained", "wrong", "abstained"], [0.9, 0.5, 0.8, 0.5], list("abab")
    )
    m = summarise(made, IntegerVerifier(), resamples=10).metrics
    assert (m["accuracy"], m["outcome/abstained"], m["accuracy_attempted"]) == (0.25, 0.5, 0.5)
    none = table(["5", "6"], ["correct", "wrong"], [0.9, 0.8], list("ab"))
    assert "accuracy_attempted" not in summarise(none, IntegerVerifier(), resamples=10).metrics


def test_a_summary_by_hand():
    made = table(["5", "5.0", "05", None], ["correct", "unparseable", "correct", "none"],
                 [0.9, 0.9, 0.6, math.nan], ["a", "a", "b", "b"])  # fmt: skip
    summary = summarise(made, IntegerVerifier(), resamples=50)
    m = summary.metrics
    assert m["accuracy"] == 0.5 and m["coverage"] == 0.75
    assert m["brier"] == pytest.approx((0.01 + 0.81 + 0.16) / 3)
    assert m["ece"] == pytest.approx((2 * 0.4 + 0.4) / 3)  # bin .9: 0.9 against 1/2; bin .6: 0.6 against 1
    assert m["outcome/unparseable"] == m["outcome/none"] == 0.25 and m["outcome/timeout"] == 0
    assert (m["prompts"], m["samples"]) == (2, 4)
    assert m["sem/accuracy"] == pytest.approx(0.5 / math.sqrt(4), rel=0.2)
    assert summary.scaling["pass@k"] == [0.5, 1.0]
    assert summary.scaling["maj"] == [0.5, 0.75]  # prompt a: a tie between two classes; b: the only answer wins
    assert len(lines({"x": summary})) == 2


def test_prompts_with_different_numbers_of_samples_have_no_scaling():
    made = table(["5", "5", "5"], ["correct"] * 3, [0.9] * 3, ["a", "a", "b"])
    assert summarise(made, IntegerVerifier(), resamples=10).scaling == {}


def test_an_evaluation_without_any_answer_is_nan_not_a_crash():
    made = table([None, None], ["none", "none"], [math.nan, math.nan], ["a", "b"])
    m = summarise(made, IntegerVerifier(), resamples=10).metrics
    assert m["accuracy"] == 0 and m["coverage"] == 0 and math.isnan(m["ece"]) and math.isnan(m["auroc"])


def test_training_leaves_what_tables_need(outputs):
    client, found = runs(outputs)
    assert len(found) == 3
    for run in found:
        assert run.data.metrics["eval/val/samples"] == run.data.metrics["eval/easy/samples"] == 24
        scaling = client.get_metric_history(run.info.run_id, "eval/val/scaling/pass_at_k")
        assert [m.step for m in scaling] == [1, 2, 3, 4]
        names = {Path(a.path).name for a in client.list_artifacts(run.info.run_id, "evaluation")}
        assert {"val.parquet", "val.json", "val_reliability.png", "val_reliability.svg", "val_scaling.svg"} <= names


def test_the_command_measures_as_training_did(outputs, capsys):
    client, found = runs(outputs)
    run = found[0]
    before = run.data.metrics
    call(evaluate, outputs, f"run={run.info.run_id}", "split=[val,easy]", "prompts=6", "samples=4")
    after = client.get_run(run.info.run_id)
    assert after.data.metrics["eval/val/brier"] == pytest.approx(before["eval/val/brier"], abs=1e-6)
    assert after.info.status == "FINISHED"
    assert "val" in capsys.readouterr().out


def test_the_draws_do_not_depend_on_how_prompts_are_shared_out(tiny):
    from bae.evaluation.measure import sample
    from bae.objectives.scoring import Scorer
    from bae.rollout.local.engine import LocalEngine
    from bae.rollout.pipeline import Pipeline
    from bae.tasks.arithmetic import Arithmetic
    from bae.text.tokens import token_bytes
    from tests.objectives.test_scoring import BLOCKS, OBJECTIVES

    task = Arithmetic({"val": {"terms": [2], "digits": [1], "size": 9, "held_out": True}})
    scorer = Scorer(BLOCKS, OBJECTIVES, task.verifier, token_bytes(tiny.tokenizer))
    pipeline = Pipeline(tiny, LocalEngine(), scorer, task, "", 6, 1.0)
    whole = sample(pipeline, "val", None, 3, seed=1)
    shares = [sample(pipeline, "val", None, 3, seed=1, rank=rank, world=2) for rank in (0, 1)]
    key = ["prompt", "text"]
    assert whole[key].sort_values(key).values.tolist() == pandas.concat(shares)[key].sort_values(key).values.tolist()
    assert len(whole) == 27 and whole["prompt"].nunique() == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to evaluate"),
        (["run=/no/such"], "run=/no/such: neither an output folder nor a run"),
        (["run=x", "completions=y"], "one of the two"),
        (["completions=/no/such.jsonl"], "/no/such.jsonl"),
        (["run=x", "samples=0"], "samples=0: must be above 0"),
        (["run=x", "sampels=3"], "did you mean samples"),
    ],
)
def test_a_wrong_evaluation_is_one_sentence(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        call(evaluate, tmp_path / "outputs", *arguments)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_run_is_found_from_another_folder(tmp_path, monkeypatch):
    """The run logs to its own store, not to a new one in the working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    call(train, Path("outputs"), *TINY, "callbacks.evaluation.splits=[]")
    (folder,) = (tmp_path / "here/outputs/runs").iterdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    few = [f"run={folder}", "split=val", "prompts=2", "samples=2", "resamples=20"]
    call(evaluate, Path("outputs"), *few)
    _, (run,) = runs(tmp_path / "here/outputs")
    assert run.data.metrics["eval/val/samples"] == 4
    assert not any((tmp_path / "elsewhere").rglob("mlflow.db"))


def test_a_split_that_is_not_there_is_one_sentence(outputs):
    _, found = runs(outputs)
    with pytest.raises(SystemExit, match="no split 'vall'"):
        call(evaluate, outputs, f"run={found[0].info.run_id}", "split=vall")


def test_completions_of_others_are_scored_without_a_model(tmp_path):
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1), "model": model,
             "completion": f"<answer>{i + (i % 3 > 0)}</answer><confidence>0.{5 + i % 4}</confidence>"}
            for i in range(12) for model in ("a/b", "c")]  # fmt: skip
    file = tmp_path / "completions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    call(evaluate, tmp_path / "outputs", f"completions={file}", "columns.model=model", "resamples=50")
    _, (run,) = runs(tmp_path / "outputs")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/a_b/accuracy"] == pytest.approx(8 / 12)
    assert run.data.metrics["eval/c/coverage"] == 1


def test_verdicts_and_confidences_are_taken_as_they_are(tmp_path):
    file = tmp_path / "judged.csv"
    file.write_text("id,right,stated\n" + "a,true,0.9\na,false,0.6\nb,1,\nb,correct,1\n")
    columns = ["columns.correct=right", "columns.confidence=stated", "columns.question=id"]
    with pytest.warns(UserWarning, match="judged.csv, row 3: it states no confidence"):
        call(evaluate, tmp_path / "outputs", f"completions={file}", *columns, "resamples=20")
    _, (run,) = runs(tmp_path / "outputs")
    m = run.data.metrics
    assert m["eval/completions/accuracy"] == m["eval/completions/coverage"] == 0.75
    assert m["eval/completions/brier"] == pytest.approx((0.01 + 0.36 + 0) / 3)
    assert m["eval/completions/prompts"] == 2 and m["eval/completions/scaling/pass_at_k"] == 1
    assert "eval/completions/scaling/maj" not in m  # it would compare answers


def test_a_report_has_the_published_numbers_and_ours(outputs, capsys):
    call(report, outputs, "table=1", "resamples=50")
    out = capsys.readouterr().out
    folder = outputs / "reports"
    values = pandas.read_csv(folder / "table1.csv", keep_default_na=False)
    ours = values[values["source"] == "tiny"].set_index("method")
    assert list(ours.index) == ["OCB", "None"] and [int(float(n)) for n in ours["runs"]] == [2, 1]
    _, found = runs(outputs)
    ocb = [r.data.metrics["eval/val/brier"] for r in found if r.data.params["baseline"] == "ocb"]
    assert float(ours["brier"]["OCB"]) == pytest.approx(sum(ocb) / 2)
    assert float(ours["brier_sem"]["OCB"]) == pytest.approx(abs(ocb[0] - ocb[1]) / 2)
    assert 0 < float(ours["brier_p"]["None"]) <= 1 and ours["brier_p"]["OCB"] == ""
    assert (
        "0.0297 ± 0.0064 |" in out
        and "arithmetic val" in out
        and "ECE<br>Qwen2.5-3B-Instruct (paper)" in out
        and "tiny (0.45 M parameters), 2 seeds" in out
    )  # OCB's published ECE
    assert "missing: RLCR on MATH500, tiny: no finished run; bae-train -m experiment=table1" in out
    assert r"\toprule" in (folder / "table1.tex").read_text()


def test_a_report_of_other_experiments_has_the_published_numbers(outputs, capsys):
    call(report, outputs, "table=7", "figure=4", "experiments=[other]")
    out = capsys.readouterr().out
    assert out.count("missing: no finished runs") == 4 and "0.1447" not in out and "0.1459 ± 0.0043" in out


@pytest.mark.parametrize("arguments", [["table=1", "runs=[abc]"], ["figure=4", "runs=[abc]"]])
def test_a_report_of_a_run_that_is_not_there_is_refused(outputs, arguments):
    with pytest.raises(SystemExit, match=r"not in the MLflow store .*abc"):
        call(report, outputs, *arguments)


def test_a_report_of_an_empty_store_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="there is no MLflow store at"):
        call(report, tmp_path / "outputs", "table=1")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("figure", [2, 4, "training"])
def test_a_figure_is_drawn(outputs, figure):
    call(report, outputs, f"figure={figure}")
    for kind in ("png", "svg"):
        assert (outputs / "reports" / f"figure{figure}_tiny.{kind}").stat().st_size > 5000


def test_two_attempts_are_measured_apart(tmp_path, capsys):
    outputs = tmp_path / "outputs"
    few = ["steps=2", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=8",
           "callbacks.held_out.every=1", "callbacks.evaluation.splits=[easy]", "callbacks.evaluation.prompts=8",
           "callbacks.evaluation.samples=4"]  # fmt: skip
    call(train, outputs, "experiment=two_attempt", *few)
    out = capsys.readouterr().out
    assert "attempt_2/accuracy" in out and "ece" not in out.splitlines()[-1] and "auroc" not in out
    _, (run,) = runs(outputs)
    for name in ("val/attempt_2/scaling/maj", "eval/easy/attempt_2/accuracy", "eval/easy/attempt_2/sem/accuracy",
                 "eval/easy/attempt_2/scaling/pass_at_k", "train/reward/second_attempt"):  # fmt: skip
        assert 0 <= run.data.metrics[name] <= 1, name
    assert not any("maxconf" in name for name in run.data.metrics)  # nobody states a confidence
    folder = Path(run.data.tags["output_folder"]) / "evaluation"
    table = pandas.read_parquet(folder / "easy.parquet")
    assert run.data.metrics["eval/easy/attempt_2/accuracy"] == pytest.approx(table["correct_2"].mean())
    assert (folder / "easy_scaling.png").is_file() and not (folder / "easy_reliability.png").exists()
    call(report, outputs, "figure=3")
    assert (outputs / "reports" / "figure3_tiny_two_attempt.png").stat().st_size > 5000


def test_a_sweep_leaves_out_what_is_finished(outputs, capsys):
    before = len(runs(outputs)[1])
    call(train, outputs, *TINY, "method=ocb", "seed=1", "skip_finished=true")
    assert "done before: run" in capsys.readouterr().out and len(runs(outputs)[1]) == before


def test_error_distributions_are_drawn(tmp_path):
    from bae.evaluation import figures

    names = [f"baseline {i}" for i in range(8)]
    errors = {
        "correct": {name: torch.randn(50).tolist() for name in names},
        "incorrect": {names[0]: [0.1, 0.1, 0.1], names[1]: [], names[2]: [0.3], names[7]: [0.3, 0.4]},
    }
    figure = figures.error_distributions(errors)
    for path in figures.save(figure, tmp_path / "errors"):
        assert path.stat().st_size > 5000
    top, bottom = figure.axes
    assert [len(panel.collections) for panel in (top, bottom)] == [8, 3]  # what is constant has a line, nothing nothing
    assert top.collections[7].get_facecolor().tolist() == top.collections[0].get_facecolor().tolist()
    assert [text.get_text() for text in bottom.texts[:3]] == ["0.100", "n/a", "0.300"]
    low, high = bottom.get_ylim()
    assert low == -high and top.get_ylim() == (low, high)
    heights = [path.vertices[:, 1] for violin in top.collections for path in violin.get_paths()]
    assert all(low < y.min() and y.max() < high for y in heights)  # no violin is cut off
    given = figures.error_distributions(errors, {"correct": {names[0]: 0.0421}}).axes[0]
    assert [text.get_text() for text in given.texts[:2]] == ["0.042", "n/a"]
    assert figures.error_distributions({"all": {"OCB": [0.0]}}).axes[0].get_ylim() == (-1, 1)


def test_bars_of_curves_do_not_cover_each_other():
    from bae.evaluation import figures

    histories = {name: [dict.fromkeys(range(8), seed + i) for seed in (0, 1)] for i, name in enumerate("abc")}
    (panel,) = figures.training_curves({"": histories}, "ECE on held-out problems").axes
    bars = [{segment[0][0] for segment in bar.get_segments()} for bar in panel.collections]
    assert len(bars) == 3 and all(bars) and len(set.union(*bars)) == sum(map(len, bars))
    assert panel.get_ylabel() == "ECE on held-out problems" and panel.lines[0].get_ydata().tolist() == [0.5] * 8


def test_the_style_sheet_is_found_by_its_name():
    import matplotlib

    with matplotlib.style.context("bae.evaluation.paper"):
        assert matplotlib.rcParams["savefig.dpi"] == 300
    assert matplotlib.rcParams["savefig.dpi"] != 300  # importing figures changes nothing
