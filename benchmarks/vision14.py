"""Fourteen image data sets: those of vision8 and six more."""

from mergectl.benchmarks._vision import FOURTEEN

TITLE = "vision8 and CIFAR-100, STL-10, Flowers102, Oxford-IIIT Pet, PCAM, FER2013"
PAPER = "arXiv:2405.07813"
TASKS = FOURTEEN
