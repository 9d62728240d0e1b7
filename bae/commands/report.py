"""`bae-report`: make the paper's tables and figures from the runs in MLflow, with the published numbers beside ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from bae.commands import cli
from bae.commands.build import plain

if TYPE_CHECKING:
    from bae.report.finished_runs import FinishedRuns


def main() -> None:
    """Run `bae-report`."""
    cli.run(report, "report")


def report(cfg: DictConfig) -> None:
    """Write the table and the figure that the configuration names; print the table, and what is missing."""
    from bae.report.finished_runs import FinishedRuns
    from bae.report.store import StoreError

    if cfg.table is None and cfg.figure is None:
        raise cli.UserError(
            "name what to report: table=1 (2, 3, 5, 6, 7, rivals), figure=1 (2, 3, 4, training), or both"
        )
    table = None if cfg.table is None else load_spec("table", cfg.table)
    figure = None if cfg.figure is None else load_spec("figure", cfg.figure)
    finished = FinishedRuns(cfg.logger.tracking_uri, cfg.experiments, cfg.runs, cfg.models, cfg.resamples)
    folder = Path(cfg.folder)
    try:
        finished.check()
        folder.mkdir(parents=True, exist_ok=True)
        if table:
            write_tables(table, f"table{cfg.table}", folder, finished)
        if figure:
            write_figure(figure, f"figure{cfg.figure}", folder, finished)
    except StoreError as error:
        raise cli.UserError(str(error)) from error
    for line in unsent(Path(cfg.outputs)):
        print(line)


def unsent(outputs: Path) -> list[str]:
    """Return a line for each run of this folder that MLflow does not have in full, so that no table has it in full."""
    from bae.report.run_log import logs_below

    counts = [(log.folder, log.unsent()) for log in logs_below(outputs)]
    return [f"not in MLflow yet: {n} entries; send them with: bae-sync run={folder}" for folder, n in counts if n]


def load_spec(kind: str, name: str) -> Mapping[str, Any]:
    """Read conf/report/<kind><name>.yaml. Raises UserError if there is none.

    It is no config group, because Hydra takes no number for an option.
    """
    known = sorted(path.stem.removeprefix(kind) for path in (cli.CONF / "report").glob(f"{kind}*.yaml"))
    if name not in known:
        raise cli.UserError(f"{kind}={name}: no such {kind}; there are {', '.join(known)}")
    spec: Mapping[str, Any] = plain(hydra.compose(f"report/{kind}{name}"))["report"]
    return spec


def write_tables(spec: Mapping[str, Any], stem: str, folder: Path, finished: "FinishedRuns") -> None:
    """Write a table, or several into one file: <stem>.md, .tex and .csv."""
    import pandas

    from bae.report.tables import make_table, to_latex, to_markdown

    tables = [make_table(part, finished) for part in ([spec] if "methods" in spec else spec.values())]
    markdown = "\n\n".join(map(to_markdown, tables)) + "\n"
    (folder / f"{stem}.md").write_text(markdown)
    (folder / f"{stem}.tex").write_text("\n\n".join(map(to_latex, tables)) + "\n")
    pandas.concat([table.values for table in tables]).to_csv(folder / f"{stem}.csv", index=False)
    print(markdown)
    print("\n".join(str(folder / f"{stem}.{kind}") for kind in ("md", "tex", "csv")))


def write_figure(spec: Mapping[str, Any], stem: str, folder: Path, finished: "FinishedRuns") -> None:
    """Draw a figure of each model that has runs for it: <stem>_<model>.png and .svg."""
    from bae.evaluation import figures
    from bae.report.paper_figures import PLOTS

    drawn, missing = PLOTS[spec["kind"]](spec, finished)
    for model, figure in drawn.items():
        print("\n".join(map(str, figures.save(figure, folder / f"{stem}_{model}"))))
    print("\n".join(f"missing: {line}" for line in missing))


if __name__ == "__main__":
    main()
