"""What the worker does for a suite, in a screen: items from arrays, one table of rows, nothing written."""

import numpy as np

from bench.identity import seed_for
from bench.types import Item, Table


class FakeData:
    """A manifest: {id: (uint8 [H, W, 3], attributes)}."""

    def __init__(self, pictures):
        self.pictures = pictures

    def ids(self):
        return list(self.pictures)

    def chunks(self, size):
        ids = self.ids()
        return [ids[i : i + size] for i in range(0, len(ids), size)]


class FakeContext:
    device = "cpu"

    def __init__(self, data, suite, batch=3):
        self.data, self.suite, self.batch = data, suite, batch
        self.resizes = []

    def batches(self, unit):
        for i in range(0, len(unit.items), self.batch):
            yield list(unit.items[i : i + self.batch])

    def item(self, id):
        return Item(id, attributes=self.data.pictures[id][1])

    def images(self, ids, size, resize="adm"):
        import torch

        from bench.images import RESIZES

        self.resizes.append(resize)
        pictures = np.stack([RESIZES[resize](self.data.pictures[id][0], size) for id in ids])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)

    def seed(self, item, stream="latent"):
        return seed_for(0, self.suite.name, self.suite.version, item, stream)

    def generator(self, item, stream):
        import torch

        return torch.Generator("cpu").manual_seed(self.seed(item, stream))


def measure(suite, model, data, batch=3, metrics=None):
    """All units of a suite over a model: the table, and the media of each item by name."""
    context = FakeContext(data, suite, batch)
    metrics = suite.metrics if metrics is None else metrics
    rows, kept, features = [], {}, {}
    for unit in suite.units(data):
        for ids, media in suite.run(unit, model, context):
            new = [{"item": id, **data.pictures[id][1]} for id in ids]
            pictures = {name: m for name, m in media.items() if hasattr(m, "shape")}
            measured = [{k: v for k, v in media.items() if k not in pictures}]
            measured += [metric.measure(media, context) for metric in metrics]
            own = {}  # of this batch: metrics of one network return the same features
            for columns in measured:
                for name, values in columns.items():
                    assert len(values) == len(ids)
                    if getattr(values, "ndim", 1) > 1:
                        own[name] = np.asarray(values, np.float32)
                    else:
                        for row, value in zip(new, values, strict=True):
                            row[name] = value
            for name, values in own.items():
                features.setdefault(name, []).append(values)
            rows += new
            for i, id in enumerate(ids):
                kept[id] = {name: m[i] for name, m in pictures.items()}
    whole = {name: np.concatenate(parts) for name, parts in features.items()}
    return Table(rows, load_features=whole.__getitem__), kept
