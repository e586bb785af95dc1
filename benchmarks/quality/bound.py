"""What a user's first events tell of later ones: a logistic model of three numbers, no ids, no text.

    python -m benchmarks.quality.bound --data study/movielens/data \
        --users study/movielens/stores/user --items study/movielens/stores/item

The numbers are the item's share of likes in profile and training windows (without the event itself),
the user's share of likes in the events that prompts may read, and how much more than that the user
liked the item's categories there. What this model gains over the item's share alone is in the events
behind the prompts; an arm that gains less has lost it on the way from events to text, from text to
vector, or from vector to prediction. With --users, the last lines are the same model of the item's
share and a store's vectors: what is left on the second of these ways. With --items too, so is the
cosine of the user's and the item's vector, which is all that ranks the items of one user without
training.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from llm_knowledge.store.reader import KnowledgeStore
from trainer.evaluation.bootstrap import user_aucs
from trainer.models.meta import standardise

FEATURES = {
    "item's share of likes": [0],
    "+ user's share of likes": [0, 1],
    "+ user's liking of its categories": [0, 1, 2],
}
PENALTY = 3e-4  # on the squared weights of vectors
# Observations that a share starts with, at the share of the level above.
ITEM_PRIOR, USER_PRIOR, CATEGORY_PRIOR = 5, 5, 3


class Counts:
    """Likes and events of keys."""

    def __init__(self) -> None:
        self.likes: defaultdict = defaultdict(int)
        self.events: defaultdict = defaultdict(int)

    def add(self, key: object, label: int) -> None:
        """Counts one event."""
        self.likes[key] += label
        self.events[key] += 1

    def share(self, key: object, prior: float, at: float, without: int | None = None) -> float:
        """Share of likes of a key, smoothed; `without` is the label of an event to leave out."""
        likes, events = self.likes[key], self.events[key]
        if without is not None:
            likes, events = likes - without, events - 1
        return (likes + prior * at) / (events + prior)


def events(data: Path, *splits: str) -> list[tuple]:
    """(user, item, label) of every event of the splits that exist."""
    found: list[tuple] = []
    for split in splits:
        if (data / split).exists():
            table = pq.read_table(data / split, columns=["user_id", "item_id", "label"])
            found += zip(*(column.to_pylist() for column in table.columns), strict=True)
    return found


def features(data: Path) -> dict[str, tuple[Tensor, Tensor, np.ndarray, np.ndarray]]:
    """Numbers [N, 3], labels [N], users [N] and items [N] of the train and test splits."""
    catalogue = pq.read_table(data / "items.parquet", columns=["item_id", "categories"])
    categories = dict(zip(*(column.to_pylist() for column in catalogue.columns), strict=True))
    by_item, by_user, by_category = Counts(), Counts(), Counts()
    for _, item, label in events(data, "profile", "train"):
        by_item.add(item, label)
    for user, item, label in events(data, "profile", "introduction"):
        by_user.add(user, label)
        for category in categories[item] or []:
            by_category.add((user, category), label)
    base = sum(by_item.likes.values()) / sum(by_item.events.values())

    def numbers(user: object, item: object, own_label: int | None) -> list[float]:
        liked = by_item.share(item, ITEM_PRIOR, base, own_label)
        pleased = by_user.share(user, USER_PRIOR, base)
        tastes = [
            by_category.share((user, category), CATEGORY_PRIOR, pleased) - pleased
            for category in categories[item] or []
        ]
        odds = [float(np.log(share / (1 - share))) for share in (liked, pleased)]
        return [*odds, float(np.mean(tastes)) if tastes else 0.0]

    found = {}
    for split in ("train", "test"):
        rows = events(data, split)
        values = [numbers(u, i, label if split == "train" else None) for u, i, label in rows]
        labels = torch.tensor([float(label) for *_, label in rows])
        users, items = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
        found[split] = torch.tensor(values), labels, users, items
    return found


def fit(x: Tensor, y: Tensor, penalised: int = 0) -> Tensor:
    """Weights of a logistic regression, the last ones `penalised`; then the constant."""
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], y)
        value = value + PENALTY * weights[x.shape[1] - penalised : -1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach()


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of pairs in the right order, ties one half."""
    everyone = np.zeros(len(labels), dtype=np.int64)  # as if all events were one user's
    return float(user_aucs(everyone, labels, scores, 1)[0])


def gauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean of the AUC inside each user, weighted by events, over users with both classes."""
    number = np.unique(users, return_inverse=True)[1]
    events = np.bincount(number)
    own = user_aucs(number, labels, scores, len(events))
    both = ~np.isnan(own)
    return float(np.average(own[both], weights=events[both]))


def _vectors(path: Path, *keys: np.ndarray) -> list[Tensor]:
    """Standardised vectors [N, dim] of every list of keys; zeros where a store has none."""
    store = KnowledgeStore.open(path)
    vectors = torch.from_numpy(standardise(store.read_vectors(0, store.manifest.rows)))
    vectors = torch.cat([vectors, torch.zeros(1, vectors.shape[1])])  # -1: no vector
    return [vectors[store.row_of(wanted)] for wanted in keys]


def main() -> None:
    """Prints a Markdown table: test AUC and GAUC of all events, and of users never trained on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset with ratings")
    parser.add_argument("--users", type=Path, nargs="*", default=[], help="stores of user vectors")
    parser.add_argument("--items", type=Path, help="store of item vectors")
    options = parser.parse_args()
    found = features(options.data)
    (x, y, trained, seen), (test_x, test_y, users, items) = found["train"], found["test"]
    mean, spread = x.mean(0), x.std(0)
    x, test_x = (x - mean) / spread, (test_x - mean) / spread
    unseen, labels = ~np.isin(users, np.unique(trained)), test_y.numpy()

    def line(name: str, x: Tensor, test_x: Tensor, penalised: int = 0) -> None:
        scores = (test_x @ fit(x, y, penalised)[:-1]).numpy()
        cells = []
        for part in (np.ones(len(labels), dtype=bool), unseen):
            cells.append(auc(labels[part], scores[part]))
            cells.append(gauc(users[part], labels[part], scores[part]))
        print(f"| {name} | {' | '.join(f'{cell:.4f}' for cell in cells)} |")

    print("| a logistic model of | AUC | GAUC | AUC, users never seen | GAUC, users never seen |")
    print("|---|---|---|---|---|")
    for name, columns in FEATURES.items():
        line(name, x[:, columns], test_x[:, columns])
    item, test_item = _vectors(options.items, seen, items) if options.items else (None, None)
    for path in options.users:
        own, test_own = _vectors(path, trained, users)
        name = f"item's share of likes, {path.name} vector"
        line(
            name,
            torch.cat([x[:, :1], own], 1),
            torch.cat([test_x[:, :1], test_own], 1),
            own.shape[1],
        )
        if item is not None:
            cosine, test_cosine = (own * item).sum(1), (test_own * test_item).sum(1)
            mean, spread = cosine.mean(), cosine.std()
            line(
                f"item's share of likes, cosine of {path.name} and {options.items.name} vector",
                torch.stack([x[:, 0], (cosine - mean) / spread], 1),
                torch.stack([test_x[:, 0], (test_cosine - mean) / spread], 1),
            )


if __name__ == "__main__":
    main()
