"""Describe a run on its page in MLflow, in Markdown: what was trained, what came of it, and how to go on."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from bae.report.run_log import RunLog

HELD_OUT = ("accuracy", "attempt_2/accuracy", "ece", "auroc", "brier", "confidence", "malformed")
"""The metrics of held-out problems that are shown, in order."""
BRIEF = ("accuracy", "ece", "brier", "auroc")
"""The ones among them that are shown in one line."""
RMSE = "fidelity/own/rmse"
PICTURES = ("pictures/reliability.png", "pictures/training.png")
"""What bae.callbacks.pictures draws."""
GAP = "&emsp;"
"""The space after a cell: MLflow puts none between the columns of a table."""

Change = tuple[str, float, float]
"""A metric, its value before the first step and after the last one; NaN where the log has none."""


def changes(log: RunLog, prefix: str, steps: int) -> list[Change]:
    """Return the held-out metrics before the first step and after step `steps`, and of no other step.

    It is read from the log of the run, which has everything, whether the store has it or not. prefix: of the metrics.
    """
    held_out = log.history(f"{prefix}/")
    rows = []
    for name in HELD_OUT:
        values = held_out.get(f"{prefix}/{name}", {})
        before, after = (values.get(step, math.nan) for step in (0, steps))
        if not (math.isnan(before) and math.isnan(after)):  # the format has such a thing
            rows.append((name, before, after))
    return rows


def rmse(log: RunLog) -> tuple[int, float] | None:
    """Return the step and the value of the last RMSE of the run's own baseline, None if there is none."""
    measured = log.history(RMSE).get(RMSE, {})
    return max(measured.items()) if measured else None


def number(value: float) -> str:
    """Return a value with three digits, or a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def description(log: RunLog, steps: int, prefix: str | None, splits: Sequence[str] = ()) -> str:
    """Return the description of a run, from what it has logged so far.

    Args:
        log: of the run.
        steps: of the whole run.
        prefix: of the metrics of held-out problems; None if it has none.
        splits: that the run evaluates after its last step.
    """
    params, command = _logged(log)
    parts = [_what(params, steps) + _in_short(log, prefix, steps), _results(log, prefix, steps), f"`{command}`"]
    parts += [_pictures(log), _places(splits), _commands(command, log.folder.absolute())]
    return "\n\n".join(part for part in parts if part)


def _logged(log: RunLog) -> tuple[dict[str, str], str]:
    """Return the parameters of a run and the command that made it."""
    params: dict[str, str] = {}
    command = "bae-train"
    for entry, _ in log.entries():
        if entry["kind"] == "params":
            params = entry["values"]
        elif entry["kind"] == "tags":
            command = entry["values"].get("mlflow.source.name", command)
    return params, command


def _what(params: Mapping[str, str], steps: int) -> str:
    """Say what was trained on what, with the settings that matter."""
    parts = [params[key] for key in ("objectives", "baseline", "demonstrations") if key in params]
    method = params.get("method") or ", ".join(parts)
    size = f"{steps} steps"
    if "prompts_per_step" in params:
        size += f" of {params['prompts_per_step']} prompts"
    if "group_size" in params:
        size += f", {params['group_size']} completions each"
    rest = [f"{key} {params[key]}" for key in ("lr", "optimizer", "strategy", "seed") if key in params]
    model = params.get("model.path", "") if params.get("model") == "pretrained" else params.get("model", "")
    return f"**{method}** on **{params.get('task', '')}**, model `{model}`: {', '.join([size, *rest])}."


def _in_short(log: RunLog, prefix: str | None, steps: int) -> str:
    """Return what the run changed in one line, for MLflow shows three lines until one asks for more."""
    found = changes(log, prefix, steps) if prefix else []
    shown = [f"{n} {number(a)} → {number(b)}" for n, a, b in found if n in BRIEF and not math.isnan(b)]
    measured = rmse(log)
    shown += [f"RMSE {number(measured[1])}"] if measured else []
    return f"\n\n**{' · '.join(shown)}**" if shown else ""


def _results(log: RunLog, prefix: str | None, steps: int) -> str:
    """Return the table of what the run changed."""
    rows = [(name, number(a), number(b)) for name, a, b in changes(log, prefix, steps)] if prefix else []
    if found := rmse(log):
        rows.append((f"RMSE of the baseline, step {found[0]}", "", number(found[1])))
    if not rows:
        return ""
    head = [f"| held-out problems | before{GAP} | after {steps} steps |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {name}{GAP} | {before}{GAP} | {after} |" for name, before, after in rows)])


def _pictures(log: RunLog) -> str:
    """Return the pictures of the run that are there, once the page can show them."""
    run_id = log.sent().run_id
    there = [path for path in PICTURES if run_id and (log.folder / path).is_file()]
    return "\n\n".join(f"![{Path(path).stem}](get-artifact?path={path}&run_uuid={run_id})" for path in there)


def _places(splits: Sequence[str]) -> str:
    """Say where the artifacts are."""
    evaluated = ", ".join(f"`evaluation/{split}_reliability.png`" for split in splits)
    shown = f"the evaluation {evaluated}; " if evaluated else ""
    return (
        f"Artifacts: pictures `pictures/`; {shown}what it wrote `completions/`; the policy `policy/`; "
        "the configuration `config.yaml`."
    )


def _commands(command: str, folder: Path) -> str:
    """Say how to resume and to evaluate the run."""
    given = shlex.quote(str(folder))
    return f"    {command.partition(' ')[0]} resume={given}\n    bae-evaluate run={given} split=[val]"
