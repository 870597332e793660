"""Twenty image data sets: those of vision14 and six more."""

from mergectl.benchmarks._vision import TWENTY

TITLE = "vision14 and EMNIST, CIFAR-10, Food-101, Fashion-MNIST, Rendered SST2, Kuzushiji-MNIST"
PAPER = "arXiv:2405.07813"
TASKS = TWENTY
