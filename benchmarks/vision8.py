"""The eight image data sets on which merged CLIP models are compared."""

from mergectl.benchmarks._vision import EIGHT

TITLE = "Eight image data sets: SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD"
PAPER = "arXiv:2212.04089"
TASKS = EIGHT
