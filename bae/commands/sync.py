"""`bae-sync`: send to MLflow what runs logged while the store was away."""

from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout
from omegaconf import DictConfig

from bae.commands import cli

if TYPE_CHECKING:
    from bae.report.run_log import RunLog


def main() -> None:
    """Run `bae-sync`."""
    cli.run(sync, "sync")


def sync(cfg: DictConfig) -> None:
    """Send the logs of one run, or of all runs below a folder; print what was sent."""
    from bae.commands.build import LATEST, newest_run, quieten
    from bae.report.run_log import logs_below

    if cfg.run is None:
        raise cli.UserError("name what to send: run=<output folder of a run>, or a folder of many, run=outputs")
    logs = logs_below(newest_run("run", Path(cfg.outputs)) if cfg.run == LATEST else Path(cfg.run))
    if not logs:
        raise cli.UserError(f"run={cfg.run}: no run below it has a log of what it logged")
    quieten()
    failed = [sentence for log in logs if (sentence := send(log, cfg.tracking_uri))]
    if failed:
        raise cli.UserError("; ".join(failed))


def send(log: "RunLog", tracking_uri: str | None) -> str | None:
    """Send a log, and print what was sent. Returns None, or a sentence that says why it could not be sent.

    tracking_uri: None for the store that the run was begun with.
    """
    from bae.report.shipping import Shipper
    from bae.report.store import answering

    count, begun = log.unsent(), log.begun()
    if begun is None:
        return f"{log.path} does not say to which experiment it belongs"
    uri = tracking_uri or begun["tracking_uri"]
    try:
        shipper = Shipper(log, uri)
        with shipper.alone(timeout=1), answering(uri):
            while shipper.send():
                pass
    except Timeout:
        return f"{log.folder}: another process is sending what it logs; it is the run itself, or another bae-sync"
    except (ValueError, OSError) as error:
        return f"{log.folder}: {log.unsent()} entries wait for {error}"
    print(f"{log.folder}: {count} entries sent; run {shipper.sent.run_id} in {uri}")
    return None


if __name__ == "__main__":
    main()
