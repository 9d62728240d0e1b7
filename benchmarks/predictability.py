"""Ask how well simple features of a completion tell whether it is right: python benchmarks/predictability.py TABLE …

TABLE is the table of an evaluation, outputs/…/evaluation/val.parquet, with several completions of each problem. The
features are those that the completion itself shows: steps, signs, sizes of numbers, length. A model of them is fitted
to nine tenths of the problems and asked about the last, ten times. So its AUROC and Brier score say what a policy can
reach that looks at no more than this. The oracle knows how often the other completions of the same problem were right.
"""

import argparse
import re

import numpy as np
import pandas
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

MODELS = {
    "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
    "boosted trees": HistGradientBoostingClassifier(max_depth=3, max_iter=60, random_state=0),
}


def features(text):
    """What a completion shows: a list of numbers."""
    solution = re.search(r"<reasoning>(.*?)</reasoning>", text, re.DOTALL)
    solution = solution[1] if solution else ""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", solution)] or [0.0]
    signs = [solution.count(sign) for sign in "=+-*/"]
    return [*signs, np.log1p(max(numbers)), np.log1p(min(numbers)), len(solution), len(numbers)]


def main():
    """Print AUROC and Brier score of each model, of the oracle, and of the stated confidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+")
    for path in parser.parse_args().tables:
        table = pandas.read_parquet(path)
        right, prompts = table["correct"].to_numpy(float), table["prompt"].to_numpy()
        x = np.array([features(text) for text in table["text"]])
        rows = {
            name: cross_val_predict(model, x, right, groups=prompts, cv=GroupKFold(10), method="predict_proba")[:, 1]
            for name, model in MODELS.items()
        }
        by_prompt = table.groupby("prompt")["correct"]
        others = by_prompt.transform("size") - 1
        rows["oracle"] = ((by_prompt.transform("sum") - right) / others).to_numpy()
        rows["stated confidence"] = table["confidence"].fillna(0).to_numpy()
        print(f"{path}: {len(table)} completions, {right.mean():.3f} right, Brier of a constant {right.var():.3f}")
        for name, q in rows.items():
            print(f"  {name:<22} AUROC {roc_auc_score(right, q):.3f}  Brier {brier_score_loss(right, q):.3f}")


if __name__ == "__main__":
    main()
