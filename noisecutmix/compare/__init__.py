"""Compare classifiers with and without augmented pictures: `python -m noisecutmix.compare --help`."""
