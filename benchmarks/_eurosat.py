"""Lists that cut EuroSAT, which has no official split: of every class 270 images tune and 270 others report.

The papers drew as many without a seed. Here NumPy's RandomState(0) permutes each class in turn, so that the lists are
always the same; a test keeps their digests.
"""

from __future__ import annotations

from mergectl.benchmarks._contract import Use

HELD = 270
IMAGES = {
    "AnnualCrop": 3000, "Forest": 3000, "HerbaceousVegetation": 3000, "Highway": 2500, "Industrial": 2500,
    "Pasture": 2000, "PermanentCrop": 2500, "Residential": 3000, "River": 2500, "SeaLake": 3000,
}  # fmt: skip


def lists(use: Use) -> list[tuple[str, str]]:
    """Return the files (as the original archive names them) and classes for one use, class by class.

    >>> len(lists("fit")), len(lists("tune")), lists("report")[0]
    (21600, 2700, ('AnnualCrop/AnnualCrop_10.jpg', 'AnnualCrop'))
    """
    import numpy as np

    random = np.random.RandomState(0)
    found = []
    for name, count in IMAGES.items():
        order = random.permutation(count) + 1
        cuts = {"tune": order[:HELD], "report": order[HELD : 2 * HELD], "fit": order[2 * HELD :]}
        found += [(f"{name}/{name}_{number}.jpg", name) for number in sorted(cuts[use].tolist())]
    return found
