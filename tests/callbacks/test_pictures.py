"""The two pictures of a run."""

import pandas
import pytest

from bae.callbacks.held_out import FOLDER, measurements
from bae.callbacks.pictures import draw


def table(confidences, correct):
    return pandas.DataFrame({"prompt": "0", "correct": correct, "confidence": confidences}).astype(
        {"confidence": "float64"}
    )


def test_both_pictures_of_two_measurements(tmp_path):
    tables = {0: table([0.9, 0.1], [False, True]), 50: table([0.9, 0.1], [True, False])}
    folder = draw(tables, tmp_path / "pictures")
    assert sorted(path.name for path in folder.iterdir()) == [
        "reliability.png", "reliability.svg", "training.png", "training.svg"
    ]  # fmt: skip
    drawn = (folder / "reliability.svg").read_text()
    assert "before (step 0)" in drawn and "after (step 50)" in drawn
    assert "ECE 0.900" in drawn and "ECE 0.100" in drawn and "n = 2" in drawn


def test_without_confidences_there_is_the_accuracy_alone(tmp_path):
    folder = draw({0: table([None, None], [True, False])}, tmp_path / "pictures")
    assert sorted(path.name for path in folder.iterdir()) == ["training.png", "training.svg"]
    assert "AUROC" not in (folder / "training.svg").read_text()


def test_measurements_come_in_the_order_of_their_steps(tmp_path):
    (tmp_path / FOLDER).mkdir()
    for step in (1_000_000, 50, 0):
        table([0.5], [True]).to_parquet(tmp_path / FOLDER / f"step_{step:06d}.parquet")
    assert list(measurements(tmp_path)) == [0, 50, 1_000_000]
    assert measurements(tmp_path)[50]["confidence"][0] == pytest.approx(0.5)
