"""All loggers of a trainer as one: each gets what it can take."""

from types import SimpleNamespace

from lightning.pytorch.loggers import CSVLogger

from bae.callbacks.run_logger import RunLogger, run_logger
from bae.report.tracking import MLflowRun


class Everything:
    """A logger of runs that writes down what it is given."""

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step):
        self.seen.append(("metrics", metrics, step))

    def log_completions(self, table, step):
        self.seen.append(("completions", table, step))

    def log_text(self, text, file):
        self.seen.append(("text", text, file))

    def log_evaluation(self, summaries, files):
        self.seen.append(("evaluation", summaries, list(files)))

    def log_folder(self, folder):
        self.seen.append(("folder", folder))

    def sync(self):
        self.seen.append(("sync",))


class MetricsAlone:
    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((metrics, step))


def log_everything(loggers, folder):
    one = run_logger(SimpleNamespace(loggers=loggers))
    one.log_metrics({"a": 1.0}, 3)
    one.log_completions({"text": ["x"]}, 4)
    one.log_text("<p>", "completions/a.html")
    one.log_evaluation({"val": "summary"}, (path for path in (folder / "a", folder / "b")))
    one.log_folder(folder)
    one.sync()


def test_each_logger_gets_everything_it_can_take(tmp_path):
    first, plain, last = Everything(), MetricsAlone(), Everything()
    log_everything([first, plain, last], tmp_path)
    assert first.seen == last.seen == [
        ("metrics", {"a": 1.0}, 3),
        ("completions", {"text": ["x"]}, 4),
        ("text", "<p>", "completions/a.html"),
        ("evaluation", {"val": "summary"}, [tmp_path / "a", tmp_path / "b"]),  # a generator reaches both
        ("folder", tmp_path),
        ("sync",),
    ]  # fmt: skip
    assert plain.seen == [({"a": 1.0}, 3)]


def test_without_a_logger_nothing_happens(tmp_path):
    log_everything([], tmp_path)


def test_lightnings_own_loggers_get_the_metrics_alone(tmp_path):
    logger = CSVLogger(tmp_path, "runs", "0")
    log_everything([logger], tmp_path)
    logger.save()
    assert (tmp_path / "runs" / "0" / "metrics.csv").read_text().splitlines() == ["a,step", "1.0,3"]
    assert not isinstance(logger, RunLogger)


def test_who_is_a_logger_of_runs():
    assert issubclass(MLflowRun, RunLogger) and isinstance(run_logger(SimpleNamespace(loggers=[])), RunLogger)
    assert isinstance(Everything(), RunLogger) and not isinstance(MetricsAlone(), RunLogger)
